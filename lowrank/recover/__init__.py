"""Training that follows the replacement."""

from .batchnorm import bn_recalibrate as bn_recalibrate
from .lrc import MasterWeights as MasterWeights
from .lrc import lrc_parameters as lrc_parameters
