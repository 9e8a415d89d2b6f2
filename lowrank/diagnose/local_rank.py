"""Local rank: of the derivative of a layer's output by the model's input, at an example.

E_x[rank_ε(J_x)] of Patel and Shwartz-Ziv (arXiv 2410.07687), where singular values above ε times
the largest count. J is not formed: its products with random directions, forward-mode derivatives in
one pass each, span the range of J if there are more of them than its rank. ε is ours, relative, and
several are reported. A model that reads ids is derived by the output of its first embedding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..calibration.batches import Batch, cut, rows_in
from ..calibration.running import first_tensor, forward, quiet
from ..errors import LowrankError
from ..walk import layouts
from ..walk.surgery import factored
from .layer_inputs import Tap

THRESHOLDS = (1e-2, 1e-3)
EXAMPLES = 4


def rank_above(threshold: float, values: Tensor) -> int:
    """How many singular values, descending, exceed this share of the largest one."""
    return int((values > threshold * values[0]).sum()) if len(values) and values[0] > 0 else 0


def local_ranks(
    model: nn.Module,
    taps: Sequence[Tap],
    batches: Sequence[Batch],
    probes: int,
    *,
    seed: int = 0,
    examples: int = EXAMPLES,
) -> dict[str, dict[float, float]]:
    """By layer and threshold, the mean local rank over the first rows of the data.

    Raises:
        LowrankError: an operation of the model has no forward-mode derivative.
    """
    generator = torch.Generator().manual_seed(seed)
    ranks: dict[str, list[dict[float, int]]] = {}
    for batch in _single_rows(batches, examples):
        found = _derivatives(model, taps, batch, probes, generator)
        for name, columns in found.items():
            values = torch.linalg.svdvals(torch.stack(columns, 1).double())
            each = {t: rank_above(t, values) for t in THRESHOLDS}
            ranks.setdefault(name, []).append(each)
    return {
        name: {t: sum(one[t] for one in each) / len(each) for t in THRESHOLDS}
        for name, each in ranks.items()
    }


def _single_rows(batches: Sequence[Batch], count: int) -> Iterator[Batch]:
    """The first rows of the data, one by one; a batch that cannot be cut counts as one."""
    places = ((batch, row) for batch in batches for row in range(rows_in(batch)))
    for batch, row in itertools.islice(places, count):
        one = cut(batch, slice(row, row + 1))
        yield batch if one is None else one


def _derivatives(
    model: nn.Module,
    taps: Sequence[Tap],
    batch: Batch,
    probes: int,
    generator: torch.Generator,
) -> dict[str, list[Tensor]]:
    """Products of the Jacobian of each layer's output with as many random directions."""
    found: dict[str, list[Tensor]] = {}
    now: dict[str, Tensor] = {}  # of several calls the first one counts

    def hook(name: str) -> Callable[..., None]:
        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is not None and name not in now:
                tangent = forward_ad.unpack_dual(tensor).tangent
                now[name] = (torch.zeros_like(tensor) if tangent is None else tangent).flatten()

        return after

    # Fused attention has no forward-mode derivative.
    with quiet(model), sdpa_kernel(SDPBackend.MATH), ExitStack() as stack:
        for tap in taps:
            stack.callback(tap.module.register_forward_hook(hook(tap.name)).remove)
        for _ in range(probes):
            now.clear()
            with forward_ad.dual_level(), _turned(model, batch, generator) as turned:
                try:
                    forward(model, turned)
                except NotImplementedError as error:
                    raise LowrankError(
                        "the local rank needs a forward-mode derivative, and the model has none: "
                        f"{str(error).splitlines()[0]}; pass probes=0"
                    ) from error
            for name, column in now.items():
                found.setdefault(name, []).append(column)
    return found


@contextmanager
def _turned(model: nn.Module, batch: Batch, generator: torch.Generator) -> Iterator[Batch]:
    """The batch with a random direction on its numbers, or, of ids, on what they look up."""
    parts: dict[str, Any] = {"": batch} if isinstance(batch, Tensor) else dict(batch)
    for name, value in parts.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1:
            parts[name] = _dual(value, generator)
            yield parts[""] if isinstance(batch, Tensor) else parts
            return
    turned: list[nn.Module] = []

    def after(module: nn.Module, _args: Any, output: Any) -> Any:
        if turned or not isinstance(output, Tensor):
            return None
        turned.append(module)
        return _dual(output, generator)

    forms = factored(model).values()
    tables = [m for m in model.modules() if layouts.kind(m) == "embedding"]
    tables += [form for form in forms if form.KIND == "embedding"]
    with ExitStack() as stack:
        for table in tables:
            stack.callback(table.register_forward_hook(after).remove)
        yield batch
    if not turned:
        raise LowrankError(
            "the local rank is of a model that reads numbers, or ids by an embedding: pass probes=0"
        )


def _dual(tensor: Tensor, generator: torch.Generator) -> Tensor:
    direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    dual: Tensor = forward_ad.make_dual(tensor, direction.to(tensor))
    return dual
