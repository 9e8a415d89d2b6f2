"""The registry of methods: wherever a name is accepted, an object is too."""

from __future__ import annotations

from ..types import JointMethod, Method
from .asvd import ASVD as ASVD
from .auto import Auto as Auto
from .basis_sharing import BasisSharing as BasisSharing
from .blast import Blast as Blast
from .convolution import CP as CP
from .convolution import Channel as Channel
from .convolution import Spatial as Spatial
from .convolution import Tubal as Tubal
from .convolution import Tucker as Tucker
from .cur import CUR as CUR
from .cur import WhitenedCUR as WhitenedCUR
from .dense_sparse import DenseSparse as DenseSparse
from .frequency import Frequency as Frequency
from .fwsvd import FWSVD as FWSVD
from .head_aware import HeadAware as HeadAware
from .lowrank_masked import LowRank24 as LowRank24
from .lowrank_masked import LowRankMasked as LowRankMasked
from .lowrank_sparse import LowRankSparse as LowRankSparse
from .nystrom import Nystrom as Nystrom
from .nystrom import WhitenedNystrom as WhitenedNystrom
from .quantized import Quantized as Quantized
from .quotient_remainder import QuotientRemainder as QuotientRemainder
from .random import Random as Random
from .snmf import SemiNMF as SemiNMF
from .spectral_masked import SpectralMasked as SpectralMasked
from .svd import SVD as SVD
from .tensor_train import TensorTrain as TensorTrain
from .two_sided import TwoSided as TwoSided
from .two_sided import TwoSidedConv as TwoSidedConv
from .two_sided import TwoSidedStored as TwoSidedStored
from .two_sided import TwoSidedTucker as TwoSidedTucker
from .whitened import Whitened as Whitened
from .whitened import WhitenedChannel as WhitenedChannel
from .whitened import WhitenedConv as WhitenedConv
from .whitened import WhitenedSpatial as WhitenedSpatial
from .whitened import WhitenedTubal as WhitenedTubal
from .whitened import WhitenedTucker as WhitenedTucker

METHODS: dict[str, type[Method]] = {
    "svd": SVD,
    "whitened": Whitened,
    "two-sided": TwoSided,
    "asvd": ASVD,
    "fwsvd": FWSVD,
    "snmf": SemiNMF,
    "nystrom": Nystrom,
    "whitened-nystrom": WhitenedNystrom,
    "cur": CUR,
    "whitened-cur": WhitenedCUR,
    "random": Random,
    "channel": Channel,
    "tucker": Tucker,
    "spatial": Spatial,
    "cp": CP,
    "tubal": Tubal,
    "whitened-channel": WhitenedChannel,
    "whitened-tucker": WhitenedTucker,
    "whitened-spatial": WhitenedSpatial,
    "whitened-tubal": WhitenedTubal,
    "whitened-conv": WhitenedConv,
    "two-sided-tucker": TwoSidedTucker,
    "two-sided-conv": TwoSidedConv,
    "two-sided-stored": TwoSidedStored,
    "frequency": Frequency,
    "head-aware": HeadAware,
    "quotient-remainder": QuotientRemainder,
    "tensor-train": TensorTrain,
    "dense-sparse": DenseSparse,
    "lowrank-sparse": LowRankSparse,
    "lowrank-masked": LowRankMasked,
    "lowrank-2:4": LowRank24,
    "spectral-masked": SpectralMasked,
    "blast": Blast,
    "auto": Auto,
    "quantized": Quantized,
}

# Methods of several sites that read one tensor; `alone` names that of single sites.
JOINT: dict[str, type[JointMethod]] = {
    "basis-sharing": BasisSharing,
}
