"""Looking before deciding: how low the ranks are, and what each layer costs when it is reduced."""

from .inspecting import Inspected as Inspected
from .inspecting import Inspection as Inspection
from .inspecting import inspect as inspect
from .sensing import sensitivity as sensitivity
from .spectrum import Spectrum as Spectrum
from .table import Sensitivity as Sensitivity
