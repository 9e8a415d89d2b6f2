"""nn.MultiheadAttention from four linear layers: q_proj, k_proj, v_proj and out_proj.

Torch's own class multiplies by `in_proj_weight` (3E, E), or by three matrices where keys or values
have other widths, and by the weight of `out_proj` without calling it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .unfused import Cut, Unfused

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
SIZES = ("embed_dim", "num_heads", "kdim", "vdim")
Masks = tuple[Tensor | None, Tensor | None]


class SplitAttention(Unfused, nn.MultiheadAttention):
    """Attention whose projections are layers (E, E), (E, kdim), (E, vdim) and (E, E).

    Layers of torch that read its weights to run a fused kernel pass over it, as over attention
    whose keys have another width.
    """

    WHOLE = nn.MultiheadAttention

    @classmethod
    def cuts(cls, module: Any) -> Mapping[str, Cut]:
        weights = {f"{name}_weight": Cut("weight", (name,)) for name in PROJECTIONS}
        if module.embed_dim == module.kdim == module.vdim:
            weights = {"in_proj_weight": Cut("weight", PROJECTIONS)}
        return {**weights, "in_proj_bias": Cut("bias", PROJECTIONS)}

    @staticmethod
    def entered(module: Any) -> None:
        module._qkv_same_embed_dim = False

    @staticmethod
    def left(module: Any) -> None:
        module._qkv_same_embed_dim = module.embed_dim == module.kdim == module.vdim

    def spec(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SIZES}

    def layers(self) -> dict[str, nn.Module]:
        return {**super().layers(), "out_proj": self.out_proj}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's: (B, T, E) with `batch_first`, else (T, B, E), or (T, E) without a batch."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        layers: Any = self._modules
        given = zip(PROJECTIONS, (query, key, value), strict=True)
        projected: list[Tensor] = [layers[name](x) for name, x in given]
        batched = query.dim() == 3
        if not batched:
            projected = [x[None] for x in projected]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            projected = [x.transpose(0, 1) for x in projected]
        q, k, v = projected  # (B, T, E), (B, S, E), (B, S, E)
        padding, mask = _additive(key_padding_mask, q), _additive(attn_mask, q)
        q, k, v, (padding, mask) = self._with_extra_keys(q, k, v, (padding, mask))
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        # The mask may be left to the kernel if it is causal and there is no other.
        causal = is_causal and padding is None and not need_weights
        whole = None if causal else _merged(padding, mask, len(q), self.num_heads)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            weights = F.softmax(scores if whole is None else scores + whole, dim=-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            heads = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            heads = F.scaled_dot_product_attention(q, k, v, whole, dropout, causal)
        output: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        if not batched:
            return output[0], weights
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _with_extra_keys(
        self, q: Tensor, k: Tensor, v: Tensor, masks: Masks
    ) -> tuple[Tensor, Tensor, Tensor, Masks]:
        """With the learned key and value, and those of zeros, where the module has them."""
        extra: list[tuple[Tensor, Tensor]] = []
        if self.bias_k is not None and self.bias_v is not None:
            extra.append((self.bias_k, self.bias_v))
        if self.add_zero_attn:
            extra.append((k.new_zeros(1, 1, k.shape[2]), v.new_zeros(1, 1, v.shape[2])))
        for key, value in extra:
            k = torch.cat([k, key.expand(len(k), -1, -1).to(k)], dim=1)
            v = torch.cat([v, value.expand(len(v), -1, -1).to(v)], dim=1)
        padding, mask = (None if m is None else F.pad(m, (0, len(extra))) for m in masks)
        return q, k, v, (padding, mask)


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask as numbers that are added to the scores; True of a boolean one forbids."""
    if mask is None or mask.is_floating_point():
        return mask if mask is None else mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask.bool(), -torch.inf)


def _merged(padding: Tensor | None, mask: Tensor | None, batch: int, heads: int) -> Tensor | None:
    """One mask that fits scores (B, heads, T, S).

    Args:
        padding: (B, S).
        mask: (T, S), or (B · heads, T, S).
    """
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (batch, heads))
    if padding is None:
        return mask
    rows = padding[:, None, None]
    return rows if mask is None else mask + rows
