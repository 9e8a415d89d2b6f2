"""N:M sparsity: at most N of each M consecutive entries of a row are kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad


def nm_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """A bool mask of the n largest of each m consecutive entries along the last dimension.

    A last group of g < m entries keeps ⌈n g / m⌉.

    Args:
        weight: (…, in).
        n, m: 1 ≤ n ≤ m.
    """
    inside = weight.shape[-1]
    size = pad(weight.detach().abs(), (0, -inside % m), value=-1.0)
    size = size.reshape(*weight.shape[:-1], -1, m)
    order = size.topk(n, dim=-1).indices  # (…, groups, n), the largest first
    mask = torch.zeros_like(size, dtype=torch.bool).scatter_(-1, order, True)
    if inside % m:
        few = math.ceil(n * (inside % m) / m)
        last = torch.zeros_like(mask[..., -1, :]).scatter_(-1, order[..., -1, :few], True)
        mask[..., -1, :] = last
    return mask.flatten(-2)[..., :inside]


def nm_bytes(mask: Tensor, m: int, itemsize: int) -> int:
    """Bytes of the kept values, plus ⌈log2 m⌉ bits each for the position in the group."""
    kept = int(mask.sum())
    return kept * itemsize + math.ceil(kept * math.ceil(math.log2(m)) / 8)
