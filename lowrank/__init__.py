"""Low-rank compression of neural networks: `model, report = lowrank.compress(model, 0.6)`."""

from . import page as page
from . import plots as plots
from . import train as train
from .api import apply as apply
from .api import compress as compress
from .api import plan as plan
from .api.by_design import factorize_by_design as factorize_by_design
from .api.efforts import EFFORTS as EFFORTS
from .api.efforts import Effort as Effort
from .api.efforts import Recovery as Recovery
from .api.sweeping import Sweep as Sweep
from .api.sweeping import sweep as sweep
from .bench import Benchmark as Benchmark
from .bench import benchmark as benchmark
from .calibrate import Calibration as Calibration
from .calibrate import calibrate as calibrate
from .diagnose import Inspection as Inspection
from .diagnose import Sensitivity as Sensitivity
from .diagnose import inspect as inspect
from .diagnose import sensitivity as sensitivity
from .errors import LowrankError as LowrankError
from .eval import kl as kl
from .eval import perplexity as perplexity
from .fisher import with_fisher as with_fisher
from .io import export as export
from .io import from_pretrained as from_pretrained
from .io import load as load
from .io import save as save
from .io import to_dense as to_dense
from .io.register import install as _install
from .kept import load_calibration as load_calibration
from .kept import save_calibration as save_calibration
from .methods import METHODS as METHODS
from .plan import Plan as Plan
from .policies import POLICIES as POLICIES
from .recover import MasterWeights as MasterWeights
from .recover import lrc_parameters as lrc_parameters
from .report import Report as Report

__version__ = "0.1.0"

# The one side effect on import: transformers learns to load what this library saved.
_install()
