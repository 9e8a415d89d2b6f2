"""Low-rank compression of neural networks: `model, report = lowrank.compress(model, 0.6)`."""

from . import page as page
from . import plots as plots
from . import train as train
from .api import apply as apply
from .api import compress as compress
from .api import plan as plan
from .api.by_design import factorize_by_design as factorize_by_design
from .api.cutting import at_rank as at_rank
from .api.estimating import estimate as estimate
from .api.extending import Extension as Extension
from .api.extending import extend_vocabulary as extend_vocabulary
from .api.routing import Routing as Routing
from .api.routing import route_mlps as route_mlps
from .api.sweeping import Sweep as Sweep
from .api.sweeping import sweep as sweep
from .api.unifying import unify_tables as unify_tables
from .calibration.file import load_calibration as load_calibration
from .calibration.file import save_calibration as save_calibration
from .calibration.fisher import with_fisher as with_fisher
from .calibration.statistics import Calibration as Calibration
from .calibration.statistics import calibrate as calibrate
from .diagnose import Comparison as Comparison
from .diagnose import FeatureTable as FeatureTable
from .diagnose import Inspection as Inspection
from .diagnose import Sensitivity as Sensitivity
from .diagnose import compare as compare
from .diagnose import concepts as concepts
from .diagnose import features as features
from .diagnose import inspect as inspect
from .diagnose import peek as peek
from .diagnose import sensitivity as sensitivity
from .errors import LowrankError as LowrankError
from .io import export as export
from .io import fold_adapters as fold_adapters
from .io import from_pretrained as from_pretrained
from .io import load as load
from .io import load_seeded as load_seeded
from .io import residual_adapters as residual_adapters
from .io import save as save
from .io import to_dense as to_dense
from .io.registration import VERBS as _VERBS
from .io.registration import install as _install
from .linalg.vectors import VectorProjection as VectorProjection
from .linalg.vectors import project_vectors as project_vectors
from .measure.bench import Benchmark as Benchmark
from .measure.bench import benchmark as benchmark
from .measure.eval import kl as kl
from .measure.eval import perplexity as perplexity
from .methods import METHODS as METHODS
from .plans.estimates import Estimate as Estimate
from .plans.plan import Plan as Plan
from .plans.report import Report as Report
from .policies import POLICIES as POLICIES
from .recover import MasterWeights as MasterWeights
from .recover import lrc_parameters as lrc_parameters
from .recover.new_tokens import only_tokens as only_tokens
from .recover.recovery import EFFORTS as EFFORTS
from .recover.recovery import Effort as Effort
from .recover.recovery import Recovery as Recovery

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`LowRankConfig` derives from a class of transformers, which is imported only when needed."""
    if name == "LowRankConfig":
        from .io.hf import LowRankConfig

        return LowRankConfig
    raise AttributeError(f"module 'lowrank' has no attribute {name!r}")


# The one side effect on import: registers with transformers, to load what this library saved.
_VERBS["compress"] = compress
_install()
