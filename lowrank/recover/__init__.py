"""Recovery: refits and training after layers have been replaced."""

from .batchnorm import bn_recalibrate as bn_recalibrate
from .lrc import MasterWeights as MasterWeights
from .lrc import lrc_parameters as lrc_parameters
