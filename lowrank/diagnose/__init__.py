"""Look before deciding: effective ranks, and the sensitivity of the model to each layer."""

from .inspection import Inspected as Inspected
from .inspection import Inspection as Inspection
from .inspection import inspect as inspect
from .sensitivities import sensitivity as sensitivity
from .sensitivity_table import Sensitivity as Sensitivity
from .spectrum import LayerSpectrum as LayerSpectrum
