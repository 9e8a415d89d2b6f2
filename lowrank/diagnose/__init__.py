"""Looking before deciding: how low the ranks are, and what each layer costs when it is reduced."""

from .inspection import Inspected as Inspected
from .inspection import Inspection as Inspection
from .inspection import inspect as inspect
from .sensitivities import sensitivity as sensitivity
from .sensitivity_table import Sensitivity as Sensitivity
from .spectrum import LayerSpectrum as LayerSpectrum
