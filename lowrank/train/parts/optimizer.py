"""Parameters replaced, grown and shrunk inside a live torch optimizer, its state carried along.

Let carry(x) be the new coordinates of a parameter x, a linear map such as M x N. A first moment is
carried in the same way, m ← carry(m). A second moment estimates squares, v ← carry(√v)², which is
exact where the map moves or drops entries and a heuristic where it mixes them (arXiv 2505.08022).
What a factored optimizer keeps (Adafactor's row and column means) is multiplied out, carried, and
averaged again. Everything happens in place: learning-rate schedulers, gradient scalers and
accelerate's wrapper keep the optimizer that they know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ...errors import LowrankError, listed
from .wrappers import inner_optimizer

Carry = Callable[[Tensor], Tensor]


@runtime_checkable
class CarriesState(Protocol):
    """An optimizer whose state only itself can take to new coordinates, as `SMMF` does."""

    def carried_state(
        self, state: Mapping[str, Any], old: Tensor, new: Tensor, carry: Carry
    ) -> dict[str, Any]:
        """The state of `old` for `new`, whose coordinates are carry(those of `old`)."""


# Names that torch's optimizers (and transformers' Adafactor) give to tensors of a parameter's shape
# which are no linear function of gradients; every other one is carried linearly.
SQUARES = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "variance"})
SIZES = frozenset({"exp_inf", "step_size"})  # not squared, never negative
MEANS = (("row_var", "col_var"), ("exp_avg_sq_row", "exp_avg_sq_col"))


def holds(optimizer: Any, parameter: Tensor) -> bool:
    """Whether the optimizer steps on this very parameter."""
    return any(parameter is p for g in inner_optimizer(optimizer).param_groups for p in g["params"])


def both_sides(left: Tensor | None = None, right: Tensor | None = None) -> Carry:
    """x (a, b) → M x N with M (a', a) and N (b, b'); None stands for the identity."""

    def carry(x: Tensor) -> Tensor:
        x = x if left is None else left.to(x) @ x
        return x if right is None else x @ right.to(x)

    return carry


def along_modes(matrices: Mapping[int, Tensor]) -> Carry:
    """A tensor multiplied along each mode by a matrix (new, old)."""

    def carry(x: Tensor) -> Tensor:
        for mode, matrix in matrices.items():
            x = torch.tensordot(matrix.to(x), x, dims=([1], [mode])).movedim(0, mode)
        return x

    return carry


def corner(shape: Sequence[int]) -> Carry:
    """What both shapes have is kept, the rest is zero: to grow or shrink at the far end."""

    def carry(x: Tensor) -> Tensor:
        new = x.new_zeros(tuple(shape))
        common = tuple(slice(0, min(a, b)) for a, b in zip(shape, x.shape, strict=True))
        new[common] = x[common]
        return new

    return carry


def replace_parameter(
    optimizer: Any,
    old: Tensor,
    new: Tensor | Iterable[Tensor],
    carry: Carry | None = None,
) -> None:
    """Step on `new` from now on, at the place and with the options that `old` had.

    Args:
        new: one parameter, several (for one dense weight, its factors), or none (drop it).
        carry: the linear map from tensors of the old shape to those of the new one, by which the
            state is carried to a single new parameter; None starts without a state.

    Raises:
        LowrankError: `old` is not there, or its state cannot be carried; nothing is changed then.
    """
    inner = inner_optimizer(optimizer)
    fresh = [new] if isinstance(new, Tensor) else list(new)
    group = next((g for g in inner.param_groups if any(p is old for p in g["params"])), None)
    if group is None:
        raise LowrankError(
            f"a parameter of shape {tuple(old.shape)} is not in the optimizer: build the optimizer "
            "from model.parameters(), and the controller after it"
        )
    state = None
    if carry is not None and inner.state.get(old):
        if len(fresh) != 1:
            raise LowrankError(f"state is carried to one parameter, got {len(fresh)}")
        own = inner.carried_state if isinstance(inner, CarriesState) else carried_state
        state = own(inner.state[old], old, fresh[0], carry)
    place = next(i for i, p in enumerate(group["params"]) if p is old)
    group["params"][place : place + 1] = fresh
    inner.state.pop(old, None)
    if state is not None:
        inner.state[fresh[0]] = state


def insert_parameters(optimizer: Any, beside: Tensor, new: Iterable[Tensor]) -> None:
    """Step on `new` too, right after `beside` and with its options.

    Raises:
        LowrankError: `beside` is not in the optimizer.
    """
    fresh = list(new)
    for group in inner_optimizer(optimizer).param_groups:
        for place, parameter in enumerate(group["params"]):
            if parameter is beside:
                group["params"][place + 1 : place + 1] = fresh
                return
    raise LowrankError(f"a parameter of shape {tuple(beside.shape)} is not in the optimizer")


def replace_weights(
    optimizer: Any,
    old: Sequence[Tensor],
    new: Tensor | Iterable[Tensor],
    carry: Carry | None = None,
) -> None:
    """Step on `new` in place of all weights of a layer, the first of which gives the place.

    Args:
        old: one dense weight, or the factors of a layer.
        carry: as for `replace_parameter`; of one dense weight only, since moments of factors are
            no linear function of one another.

    Raises:
        LowrankError: as `replace_parameter`.
    """
    first, *rest = old
    replace_parameter(optimizer, first, new, None if rest else carry)
    for weight in rest:
        replace_parameter(optimizer, weight, [])


def carried_state(
    state: Mapping[str, Any], old: Tensor, new: Tensor, carry: Carry
) -> dict[str, Any]:
    """The optimizer's state of one parameter in new coordinates; the given one is left as it is.

    Raises:
        LowrankError: a tensor in it is neither a number, nor of the parameter's shape, nor known.
    """
    done: dict[str, Any] = {}
    for row, column in MEANS:
        if state.get(row) is not None and state.get(column) is not None:
            done |= _means(row, column, state, old, new, carry)
    for name, value in state.items():
        if name in done:
            continue
        if not isinstance(value, Tensor) or value.ndim == 0:
            done[name] = value.clone() if isinstance(value, Tensor) else value
        elif value.shape == old.shape and value.is_floating_point():
            done[name] = _moment(name, value, carry)
            _check(name, done[name], new)
        else:
            raise LowrankError(
                f"the optimizer's state {name!r} is {value.dtype} of shape {tuple(value.shape)}, "
                f"its parameter {tuple(old.shape)}: such a state cannot follow a change of rank; "
                "use SGD, Adam, AdamW, Adafactor or another optimizer with plain state"
            )
    return done


def linear_state(optimizer: Any, parameter: Tensor) -> dict[str, Tensor]:
    """The live tensors of the parameter's state that are linear in its gradients (momentum)."""
    state = inner_optimizer(optimizer).state.get(parameter, {})
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor)
        and value.shape == parameter.shape
        and value.is_floating_point()
        and name not in SQUARES | SIZES
    }


def check_same_parameters(optimizer: Any, model: nn.Module) -> None:
    """Whether the optimizer steps on the model's parameters and no others.

    Raises:
        LowrankError: it misses some, or holds some that are gone; the message gives both counts.
    """
    held = {id(p) for g in inner_optimizer(optimizer).param_groups for p in g["params"]}
    live = {id(p): name for name, p in model.named_parameters()}
    missing = [name for key, name in live.items() if key not in held]
    if missing or held - set(live):
        raise LowrankError(
            f"the optimizer holds {len(held - set(live))} parameters that the model does not, and "
            f"misses {len(missing)}: {listed(missing, 3) or 'none'}"
        )


def _moment(name: str, value: Tensor, carry: Carry) -> Tensor:
    wide = value.double()
    if name in SQUARES:
        moved = carry(wide.clamp(min=0).sqrt()).square()
    elif name in SIZES:
        moved = carry(wide).abs()
    else:
        moved = carry(wide)
    return moved.to(value.dtype).contiguous()


def _means(
    row: str, column: str, state: Mapping[str, Any], old: Tensor, new: Tensor, carry: Carry
) -> dict[str, Tensor]:
    """Adafactor: v ≈ rows · columns / their mean, of the last two dimensions."""
    rows, columns = state[row].double(), state[column].double()
    flat = rows.ndim == old.ndim - 1  # (…, a) and (…, b); torch keeps the reduced dimension
    if flat:
        rows, columns = rows.unsqueeze(-1), columns.unsqueeze(-2)
    full = rows * columns / rows.mean(-2, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    moved = carry(full.sqrt()).square()
    _check(row, moved, new)
    means = {row: moved.mean(-1, keepdim=not flat), column: moved.mean(-2, keepdim=not flat)}
    return {name: value.to(state[name].dtype).contiguous() for name, value in means.items()}


def _check(name: str, moved: Tensor, new: Tensor) -> None:
    if moved.shape != new.shape:
        raise LowrankError(
            f"the optimizer's state {name!r} would become {tuple(moved.shape)}, its parameter is "
            f"{tuple(new.shape)}: the change of basis does not fit"
        )
