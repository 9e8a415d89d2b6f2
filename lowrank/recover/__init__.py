"""Training that follows the replacement."""

from .lrc import MasterWeights as MasterWeights
from .lrc import lrc_parameters as lrc_parameters
