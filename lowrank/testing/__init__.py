"""The conformance suite: the laws that every method keeps, for whoever adds one.

from lowrank.testing import check_method
check_method(MyMethod())             # AssertionError: which law, where, and by how much
"""

from .cases import CASES as CASES
from .cases import DTYPES as DTYPES
from .cases import Case as Case
from .cases import Planted as Planted
from .cases import embedding_case as embedding_case
from .cases import linear_case as linear_case
from .cases import low_rank_weight as low_rank_weight
from .crossing import check_laws as check_laws
from .error_laws import check_bound as check_bound
from .error_laws import check_curve as check_curve
from .error_laws import check_exact as check_exact
from .error_laws import check_planted as check_planted
from .joint import JOINT_LAWS as JOINT_LAWS
from .joint import check_joint_method as check_joint_method
from .joint_cases import JOINT_CASES as JOINT_CASES
from .joint_cases import JointCase as JointCase
from .joint_cases import joint_case as joint_case
from .modules import check_cost as check_cost
from .modules import check_dtype as check_dtype
from .modules import check_forward as check_forward
from .modules import check_gradients as check_gradients
from .modules import check_macs as check_macs
from .modules import check_rebuilt as check_rebuilt
from .purity import check_deterministic as check_deterministic
from .purity import check_untouched as check_untouched
from .suite import Law as Law
from .suite import check_method as check_method
from .suite import laws as laws
