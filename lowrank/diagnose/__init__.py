"""Look before deciding, and after: ranks of weights and of features, sensitivities, distances."""

from .activations import features as features
from .comparison import Comparison as Comparison
from .comparison import compare as compare
from .concept_maps import Concepts as Concepts
from .concept_maps import Peek as Peek
from .concept_maps import concepts as concepts
from .concept_maps import peek as peek
from .feature_table import FeatureTable as FeatureTable
from .inspection import Inspected as Inspected
from .inspection import Inspection as Inspection
from .inspection import inspect as inspect
from .sensitivities import sensitivity as sensitivity
from .sensitivity_table import Sensitivity as Sensitivity
from .spectrum import LayerSpectrum as LayerSpectrum
