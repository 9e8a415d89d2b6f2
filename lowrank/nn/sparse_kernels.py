"""2:4 sparse kernels of accelerators, for inference with a model that is on its device."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import LowrankError, listed
from .lowrank_masked import LowRankMaskedLinear, Masked

CAPABILITY = (8, 0)  # least CUDA compute capability with sparse kernels
DTYPES = (torch.float16, torch.bfloat16)
ROWS, COLUMNS = 32, 64  # the kernels need sides that are multiples of these


def semi_structured(model: nn.Module) -> int:
    """Multiply every 2:4 part by `torch.sparse`'s semi-structured kernels.

    For inference: they use a packed copy, which does not follow later training, casts or moves and
    is not saved. It is kept beside the stored tensors, so that memory grows.

    Returns:
        Number of layers that use the kernels from now on; the others are unchanged.

    Raises:
        LowrankError: no layer can; the reasons are given.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LowRankMaskedLinear)}
    why = {name: unfit(layer.sparse) for name, layer in layers.items()}
    fit = [layer.sparse for name, layer in layers.items() if not why[name]]
    if not fit:
        causes = listed(sorted({reason for reason in why.values() if reason}), 4)
        raise LowrankError(
            f"no layer can use semi-structured kernels: {causes or 'none is a LowRankMaskedLinear'}"
        )
    for sparse in fit:
        with torch.no_grad():
            sparse.packed = torch.sparse.to_sparse_semi_structured(sparse.dense().contiguous())
    return len(fit)


def unfit(sparse: Masked) -> str:
    """Why S cannot use the kernels; "" if it can."""
    weight, (rows, columns) = sparse.weight, (len(sparse.mask), sparse.in_features)
    if weight.device.type != "cuda":
        return f"it is on {weight.device.type}, and the kernels need CUDA"
    capability = torch.cuda.get_device_capability(weight.device)
    if capability < CAPABILITY:
        return f"the device's capability is {capability}, and the kernels need {CAPABILITY}"
    if weight.dtype not in DTYPES:
        return f"its dtype is {weight.dtype}, and the kernels need 16 bits"
    if rows % ROWS or columns % COLUMNS:
        return f"its shape ({rows}, {columns}) is not a multiple of ({ROWS}, {COLUMNS})"
    most = int((sparse.dense() != 0).view(rows, -1, 4).sum(-1).max())
    return "" if most <= 2 else "its pattern is not 2:4"
