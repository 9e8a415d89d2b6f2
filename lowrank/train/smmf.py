"""SMMF: an optimizer whose moments are square matrices of rank one (arXiv 2412.08894).

A gradient of N numbers is read as the most nearly square matrix (a, b) with a · b = N. Of the first
moment its signs and a rank-one product for its sizes are kept, of the second a rank-one product:

    M = β_M sign ∘ (r_M c_Mᵀ) + (1 − β_M) G,   β_M = β · growth^(t−1)
    V = β_V r_V c_Vᵀ + (1 − β_V) G²,           β_V = 1 − t^decay
    W ← W − lr · M / (√V + ε)

where r, c are row and column sums (non-negative factorisation of rank one: both sums are kept), and
the smaller side is scaled to sum one. The weight is stepped on with M and V before they are
compressed. State of one weight: 4 · 2(a + b) + N/8 bytes, about N/8; Adam keeps 8 N.

Against the authors' code: signs are packed, eight to a byte (there one byte each); and the state is
loaded as it was saved, where torch's own loading casts it to the parameter's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import LowrankError
from ..linalg.gram import full_precision


class SMMF(torch.optim.Optimizer):
    """Square-matricised momentum factorisation: a memory-efficient optimizer."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        beta: float = 0.9,
        growth: float = 0.999,
        decay: float = -0.5,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """
        Args:
            beta: β of the first step; 0 keeps no first moment.
            growth: factor by which β_M changes in every step, in (0, 1].
            decay: exponent of β_V, in [−1, 0]; the authors take −0.5 for CNNs, −0.8 for
                transformers.
            weight_decay: decoupled, as in AdamW.

        Raises:
            LowrankError: an option is out of range.
        """
        for name, value, good in (
            ("lr", lr, lr >= 0),
            ("beta", beta, 0 <= beta < 1),
            ("growth", growth, 0 < growth <= 1),
            ("decay", decay, -1 <= decay <= 0),
            ("eps", eps, eps >= 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
        ):
            if not good:
                raise LowrankError(f"SMMF: {name} is out of range, got {value}")
        super().__init__(
            params,
            {
                "lr": lr,
                "beta": beta,
                "growth": growth,
                "decay": decay,
                "eps": eps,
                "weight_decay": weight_decay,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient.

        Raises:
            LowrankError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load as saved: factors stay fp32 and signs bytes, whatever the parameter's dtype."""
        super().load_state_dict(dict(state_dict))
        ours = [p for group in self.param_groups for p in group["params"]]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        for key, parameter in zip(keys, ours, strict=True):
            saved = state_dict["state"].get(key, {})
            self.state[parameter].update(
                {
                    name: value.to(parameter.device, copy=True)
                    if isinstance(value, Tensor)
                    else value
                    for name, value in saved.items()
                }
            )

    def carried_state(
        self,
        state: Mapping[str, Any],
        old: Tensor,
        new: Tensor,
        carry: Callable[[Tensor], Tensor],
    ) -> dict[str, Any]:
        """The state of `old` for `new` = carry(old): multiplied out, carried, compressed again."""
        first, second = _moments(state, old.numel())
        moved: dict[str, Any] = {"step": state["step"]}
        if first is not None:
            moved |= _signed(_square(carry(first.reshape(old.shape).double())).to(first.dtype))
        root = carry(second.sqrt().reshape(old.shape).double())
        return moved | _sums("v", _square(root.square()).to(second.dtype))

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient: Tensor = parameter.grad  # type: ignore[assignment]
        if gradient.is_sparse:
            raise LowrankError("SMMF steps on dense gradients: use Embedding(sparse=False)")
        wide = torch.promote_types(parameter.dtype, torch.float32)
        matrix = _square(gradient.to(wide))  # (a, b)
        state = self.state[parameter]
        step = state.get("step", 0) + 1
        first, second = _moments(state, parameter.numel()) if state else (None, None)
        if group["beta"] == 0:
            first = matrix
        else:
            beta = group["beta"] * group["growth"] ** (step - 1)
            first = torch.zeros_like(matrix) if first is None else first.mul_(beta)
            first.add_(matrix, alpha=1 - beta)
        beta = 1 - step ** group["decay"]
        second = torch.zeros_like(matrix) if second is None else second.mul_(beta)
        second.addcmul_(matrix, matrix, value=1 - beta)
        change = first / second.sqrt().add_(group["eps"])
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(change.reshape(parameter.shape).to(parameter.dtype), alpha=group["lr"])
        state["step"] = step
        state.update(_sums("v", second) | ({} if group["beta"] == 0 else _signed(first)))


def squarest(count: int) -> tuple[int, int]:
    """a ≥ b with a · b = count and the least a + b."""
    short = next(b for b in range(math.isqrt(count), 0, -1) if count % b == 0)
    return count // short, short


def _square(tensor: Tensor) -> Tensor:
    return tensor.reshape(squarest(tensor.numel()))


def _moments(state: Mapping[str, Any], count: int) -> tuple[Tensor | None, Tensor]:
    """The first moment, where it is kept, and the second one, (a, b)."""
    second = torch.outer(state["rows_v"], state["columns_v"])
    if "signs" not in state:
        return None, second
    size = torch.outer(state["rows_m"], state["columns_m"])
    return size.mul_(unpacked(state["signs"], count).to(size.dtype).view_as(size)), second


def _signed(first: Tensor) -> dict[str, Tensor]:
    return {"signs": packed(first > 0), **_sums("m", first.abs())}


def _sums(name: str, matrix: Tensor) -> dict[str, Tensor]:
    """Row sums (a,) and column sums (b,) of a non-negative matrix, columns scaled to sum one."""
    rows, columns = matrix.sum(1), matrix.sum(0)
    total = columns.sum()
    columns = torch.where(total > 0, columns / total, columns)
    return {f"rows_{name}": rows, f"columns_{name}": columns}


def packed(bits: Tensor) -> Tensor:
    """Booleans of any shape as ⌈N/8⌉ bytes."""
    flat = torch.nn.functional.pad(bits.flatten(), (0, -bits.numel() % 8)).view(-1, 8)
    places = 2.0 ** torch.arange(8, device=bits.device)
    with full_precision(bits):
        return (flat.to(places.dtype) @ places).to(torch.uint8)  # a product is exact, and fast


def unpacked(data: Tensor, count: int) -> Tensor:
    """The first `count` booleans that `packed` was given, (count,) float32: 1 or, if false, −1."""
    places = torch.arange(8, device=data.device)
    signs = ((torch.arange(256, device=data.device)[:, None] >> places) & 1) * 2.0 - 1
    return signs[data.int()].flatten()[:count]
