"""The three verbs: plan decides, apply acts, compress does both."""

from .verbs import apply as apply
from .verbs import compress as compress
from .verbs import plan as plan
