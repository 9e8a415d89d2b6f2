"""The registry of factored modules, and what can be asked of any of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import LowrankError, unknown
from ..types import Cost
from .blast_linear import BlastLinear, blast_cost
from .channel_conv import ChannelConv
from .cp_conv import CPConv
from .dense_sparse import DenseSparseLinear, SparseDenseLinear, dense_sparse_cost, sparse_dense_cost
from .lowrank_embedding import LowRankEmbedding
from .lowrank_linear import LowRankLinear
from .lowrank_masked import LowRankMaskedLinear, low_rank_masked_cost
from .lowrank_sparse import LowRankSparseLinear, low_rank_sparse_cost
from .pivoted_linear import PivotedLinear
from .shared_linear import SharedLowRankLinear
from .spatial_conv import SpatialConv
from .tied import TiedEmbedding, TiedHead, table_of
from .tucker_conv import TuckerConv
from .usv_linear import USVLinear

FACTORED: dict[str, type[nn.Module]] = {
    "LowRankLinear": LowRankLinear,
    "PivotedLinear": PivotedLinear,
    "SharedLowRankLinear": SharedLowRankLinear,
    "ChannelConv": ChannelConv,
    "TuckerConv": TuckerConv,
    "SpatialConv": SpatialConv,
    "CPConv": CPConv,
    "LowRankEmbedding": LowRankEmbedding,
    "TiedEmbedding": TiedEmbedding,
    "TiedHead": TiedHead,
    "DenseSparseLinear": DenseSparseLinear,
    "SparseDenseLinear": SparseDenseLinear,
    "LowRankSparseLinear": LowRankSparseLinear,
    "LowRankMaskedLinear": LowRankMaskedLinear,
    "BlastLinear": BlastLinear,
    "USVLinear": USVLinear,
}

# Forms whose size is several numbers, by the storage that an option names -> the cost of a layer
# from (out, in, *size, itemsize=).
OWN_FORMS: dict[str, Callable[..., Cost]] = {
    "dense-sparse": dense_sparse_cost,
    "sparse-dense": sparse_dense_cost,
    "lowrank-sparse": low_rank_sparse_cost,
    "blast": blast_cost,
    "lowrank-masked": low_rank_masked_cost,
}

LAYOUTS = ("linear", "conv1d")


def is_factored(module: nn.Module) -> bool:
    return type(module) in FACTORED.values()


def owner_of(module: nn.Module) -> nn.Module | None:
    """The module whose tensors a reader of a table, or of a shared basis, holds; else None."""
    return module.owner if isinstance(module, SharedLowRankLinear) else table_of(module)


def layout_of(module: nn.Module) -> str:
    """How the replaced layer stored its weight: "linear" (out, in) or "conv1d" (in, out).

    Factors do not need it. It is kept so that a merged layer is of the class that was there,
    and a dense checkpoint loads in plain transformers.
    """
    return str(getattr(module, "layout", "linear"))


def remember_layout(module: nn.Module, layout: str) -> None:
    """Note on a factored module which layout it replaced.

    Raises:
        LowrankError: the layout is unknown.
    """
    if layout not in LAYOUTS:
        raise unknown("layout", str(layout), LAYOUTS)
    if layout != layout_of(module):
        module.__dict__["layout"] = layout


def describe(module: nn.Module) -> dict[str, Any]:
    """JSON that `build` turns into the same module, empty: its type, its sizes, its layout."""
    layout = layout_of(module)
    noted = {} if layout == "linear" else {"layout": layout}
    sizes: dict[str, Any] = module.spec()  # type: ignore[operator]
    return {"type": type(module).__name__, **sizes, **noted}


def build(spec: dict[str, Any], where: str) -> nn.Module:
    """The empty module (meta device) that a stored spec stands for.

    Raises:
        LowrankError: type or layout are unknown, or the sizes do not fit; `where` is named.
    """
    if not isinstance(spec, dict) or not isinstance(spec.get("type"), str):
        raise LowrankError(f"{where}: expected a spec with a 'type', got {spec!r}")
    if spec["type"] not in FACTORED:
        raise unknown(f"factored module at {where}:", spec["type"], FACTORED)
    layout = spec.get("layout", "linear")
    if layout not in LAYOUTS:
        raise unknown(f"layout at {where}:", str(layout), LAYOUTS)
    # "shared" names a module of a model, of which nothing is known here: io binds what is built.
    sizes = {k: v for k, v in spec.items() if k not in ("type", "layout", "shared")}
    words = getattr(FACTORED[spec["type"]], "WORDS", ())
    shares = getattr(FACTORED[spec["type"]], "SHARES", ())
    numbers = {k: v for k, v in sizes.items() if k not in words and k not in shares}
    wrong = {
        **{key: value for key, value in numbers.items() if not _is_size(value)},
        **{k: sizes[k] for k in words if k in sizes and not isinstance(sizes[k], str)},
    }
    if wrong:
        raise LowrankError(f"{where}: sizes must be integers >= 0, got {wrong}")
    odd = {k: sizes[k] for k in shares if k in sizes and not _is_share(sizes[k])}
    if odd:
        raise LowrankError(f"{where}: shares must be numbers in [0, 1], got {odd}")
    try:
        built: nn.Module = FACTORED[spec["type"]].empty(**sizes)  # type: ignore[attr-defined]
    except (TypeError, RuntimeError, OverflowError, AssertionError, ValueError) as error:
        why = f": {error}" if isinstance(error, LowrankError) else ""
        said = f"{where}: {spec['type']} cannot be built from {sizes}{why}"
        raise LowrankError(said) from error
    remember_layout(built, layout)
    return built


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_size(value: Any) -> bool:
    """An integer >= 0; of a convolution one a dimension, or a kind of padding."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(v, int) and v >= 0 for v in value)
    return value in ("same", "valid") or (isinstance(value, int) and value >= 0)
