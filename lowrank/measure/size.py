"""Parameters, bytes and MACs of a whole model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..types import Cost, Factored, Site


def model_cost(model: nn.Module, sites: Sequence[Site]) -> Cost:
    """Parameters and bytes of the whole model, each stored tensor once; MACs of its layers.

    Bytes count the parameters, quantized ones as their codes and scales, and the index tensors of
    factored modules. MACs are per position, of the factored modules and of `sites`.
    """
    unique = {id(parameter): parameter for parameter in model.parameters()}.values()
    factored = {id(m): m for m in model.modules() if isinstance(m, Factored)}.values()
    orders = {id(t): t for m in factored for t in m.buffers()}.values()
    return Cost(
        params=sum(p.numel() for p in unique),
        bytes=bytes_of((*unique, *orders)),
        macs=sum(cost.macs for cost in (*(m.cost() for m in factored), *(s.cost for s in sites))),
    )


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors, each once; of a quantized weight those of its codes and scales."""
    return sum(part.numel() * part.dtype.itemsize for part in stored(tensors))


def stored(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors that memory holds for these, each once: of a quantized weight, which is one in
    name, its codes and scales."""
    found: dict[int, Tensor] = {}
    for tensor in tensors:
        if _is_wrapper(tensor):
            names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
            inner = stored(getattr(tensor, name) for name in names)
            found.update({id(part): part for part in inner})
        else:
            found[id(tensor)] = tensor
    return list(found.values())


def _is_wrapper(tensor: Tensor) -> bool:
    """Whether it holds other tensors; torch's own (FSDP's, or while it traces) count as one."""
    own = type(tensor).__module__.partition(".")[0] == "torch"
    return not own and is_traceable_wrapper_subclass(tensor)
