"""The registry of methods. Wherever a name is accepted, an object with the two verbs is too."""

from __future__ import annotations

from typing import cast

from ..errors import LowrankError, unknown
from ..types import JointMethod, Method
from .asvd import ASVD as ASVD
from .auto import Auto as Auto
from .basis_sharing import BasisSharing as BasisSharing
from .blast import Blast as Blast
from .convolution import CP as CP
from .convolution import Channel as Channel
from .convolution import Channels as Channels
from .convolution import Spatial as Spatial
from .convolution import Tucker as Tucker
from .convolution import TwoSidedConv as TwoSidedConv
from .convolution import TwoSidedTucker as TwoSidedTucker
from .convolution import WhitenedChannel as WhitenedChannel
from .convolution import WhitenedConv as WhitenedConv
from .convolution import WhitenedSpatial as WhitenedSpatial
from .convolution import WhitenedTucker as WhitenedTucker
from .dense_sparse import DenseSparse as DenseSparse
from .frequency import Frequency as Frequency
from .fwsvd import FWSVD as FWSVD
from .head_aware import HeadAware as HeadAware
from .lowrank_masked import LowRank24 as LowRank24
from .lowrank_masked import LowRankMasked as LowRankMasked
from .lowrank_sparse import LowRankSparse as LowRankSparse
from .random import Random as Random
from .refitting import refitted_form as refitted_form
from .refitting import refitted_layer as refitted_layer
from .snmf import SemiNMF as SemiNMF
from .storage import Pivoted as Pivoted
from .storage import pivoted_curve as pivoted_curve
from .storage import stored_as as stored_as
from .svd import SVD as SVD
from .two_sided import TwoSided as TwoSided
from .whitened import Whitened as Whitened

METHODS: dict[str, type[Method]] = {
    "svd": SVD,
    "whitened": Whitened,
    "two-sided": TwoSided,
    "asvd": ASVD,
    "fwsvd": FWSVD,
    "snmf": SemiNMF,
    "random": Random,
    "channel": Channel,
    "tucker": Tucker,
    "spatial": Spatial,
    "cp": CP,
    "whitened-channel": WhitenedChannel,
    "whitened-tucker": WhitenedTucker,
    "whitened-spatial": WhitenedSpatial,
    "whitened-conv": WhitenedConv,
    "two-sided-tucker": TwoSidedTucker,
    "two-sided-conv": TwoSidedConv,
    "frequency": Frequency,
    "head-aware": HeadAware,
    "dense-sparse": DenseSparse,
    "lowrank-sparse": LowRankSparse,
    "lowrank-masked": LowRankMasked,
    "lowrank-2:4": LowRank24,
    "blast": Blast,
    "auto": Auto,
}

# Those of several sites that read one tensor; they name the method of sites that are alone.
JOINT: dict[str, type[JointMethod]] = {
    "basis-sharing": BasisSharing,
}

# What a method hands the sites of a kind to that its own statistics do not fit.
BY_KIND: dict[str, dict[str, str]] = {
    "whitened": {"embedding": "head-aware", "conv": "whitened-conv"},
    "two-sided": {"embedding": "head-aware", "conv": "two-sided-conv"},
}


def method(named: str | Method, seed: int = 0) -> Method:
    """The method that a name stands for, with the given seed; an object is returned as it is."""
    if isinstance(named, str):
        if named in JOINT:
            raise LowrankError(f"method {named!r} factors groups of layers together, not one alone")
        if named not in METHODS:
            raise unknown("method", named, [*METHODS, *JOINT])
        return METHODS[named](seed=seed)  # type: ignore[call-arg]
    if joint(named) is not None:
        raise LowrankError(f"{type(named).__name__} factors groups of layers, not one alone")
    if not (callable(getattr(named, "curve", None)) and callable(getattr(named, "factor", None))):
        raise LowrankError(f"a method has the verbs curve and factor; got {type(named).__name__}")
    return named


def joint(named: str | Method | JointMethod | None, seed: int = 0) -> JointMethod | None:
    """The joint method that a name or an object stands for; None if it is none."""
    if isinstance(named, str):
        return JOINT[named](seed=seed) if named in JOINT else None  # type: ignore[call-arg]
    return cast(JointMethod, named) if hasattr(named, "alone") else None


def own_form(named: str | Method | JointMethod | None) -> bool:
    """Whether the method stores layers in a form of its own, sized by several numbers, not ranks:
    it has `own_form`."""
    way = METHODS.get(named) if isinstance(named, str) else named
    return bool(getattr(way, "own_form", False))


def for_kind(way: Method, kind: str) -> Method:
    """The method that factors sites of `kind` when `way` was asked for."""
    for name, others in BY_KIND.items():
        if type(way) is METHODS[name] and kind in others:
            return method(others[kind], getattr(way, "seed", 0))
    return way
