"""The three verbs: `plan` decides, `apply` carries out a plan, `compress` does both."""

from .verbs import apply as apply
from .verbs import compress as compress
from .verbs import plan as plan
