"""2:4 on accelerators that skip the zeros: for inference, on a model that is in its place."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import LowrankError, listed
from .lowrank_masked import LowRankMaskedLinear, Masked

CAPABILITY = (8, 0)  # of CUDA devices: from here on they have sparse kernels
DTYPES = (torch.float16, torch.bfloat16)
ROWS, COLUMNS = 32, 64  # sides that those kernels take are multiples of these


def semi_structured(model: nn.Module) -> int:
    """Let every 2:4 part be multiplied by `torch.sparse`'s semi-structured kernels.

    For inference: what is multiplied is a copy that knows nothing of later training, casts or
    moves, and no file holds it. It is beside the stored tensors, so that memory grows.

    Returns:
        How many layers do so from now on; the others multiply as before.

    Raises:
        LowrankError: none can, with the reasons.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LowRankMaskedLinear)}
    why = {name: unfit(layer.sparse) for name, layer in layers.items()}
    fit = [layer.sparse for name, layer in layers.items() if not why[name]]
    if not fit:
        said = listed(sorted({reason for reason in why.values() if reason}), 4)
        raise LowrankError(
            f"no layer can use semi-structured kernels: {said or 'none is a LowRankMaskedLinear'}"
        )
    for sparse in fit:
        with torch.no_grad():
            sparse.packed = torch.sparse.to_sparse_semi_structured(sparse.dense().contiguous())
    return len(fit)


def unfit(sparse: Masked) -> str:
    """Why S cannot be multiplied so; "" if it can."""
    weight, (rows, columns) = sparse.weight, (len(sparse.mask), sparse.in_features)
    if weight.device.type != "cuda":
        return f"it is on {weight.device.type}, and the kernels are CUDA's"
    capability = torch.cuda.get_device_capability(weight.device)
    if capability < CAPABILITY:
        return f"the device's capability is {capability}, and the kernels need {CAPABILITY}"
    if weight.dtype not in DTYPES:
        return f"its dtype is {weight.dtype}, and the kernels take 16 bits"
    if rows % ROWS or columns % COLUMNS:
        return f"its shape ({rows}, {columns}) is no multiple of ({ROWS}, {COLUMNS})"
    most = int((sparse.dense() != 0).view(rows, -1, 4).sum(-1).max())
    return "" if most <= 2 else "its pattern is not 2:4"
