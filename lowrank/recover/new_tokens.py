"""Training of some tokens' numbers alone, such as those of a vocabulary's new tokens.

UNKs Everywhere (arXiv 2012.15562) and OFA (arXiv 2311.08849) learn coordinates for new tokens over
a basis that stays; here the old tokens' coordinates, and all else, stay too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowrankError, listed
from ..walk.vocabulary import token_rows


@contextmanager
def only_tokens(model: nn.Module, ids: Iterable[int]) -> Iterator[list[dict[str, Any]]]:
    """A context in which training changes the numbers of these tokens and nothing else.

        with lowrank.only_tokens(model, extension.ids) as groups:
            optimizer = torch.optim.AdamW(groups, lr=1e-2)

    Of a factored table these are coordinates, over a basis that stays; of a dense one, rows; of a
    head, biases too. Gradients of all other tokens are zero inside, so that optimizers without
    weight decay leave those bit for bit as they are.

    Args:
        model: of transformers; afterwards the parameters are as trainable as before.
        ids: of tokens.

    Yields:
        Parameter groups for an optimizer, which switch its weight decay off.

    Raises:
        LowrankError: there is no such token, or a table or head has no row for each token.
    """
    rows = token_rows(model)
    wanted, most = sorted(set(map(int, ids))), min(map(len, rows))
    if not wanted or wanted[0] < 0 or wanted[-1] >= most:
        raise LowrankError(f"expected ids of tokens in [0, {most - 1}], got {_said(wanted)}")
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    hooks = []
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        for parameter in rows:
            parameter.requires_grad_(True)
            hooks.append(parameter.register_hook(_only(wanted)))
        yield [{"params": rows, "weight_decay": 0.0}]
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, trained in before:
            parameter.requires_grad_(trained)


def _said(ids: list[int]) -> str:
    return listed(map(str, ids), 3) or "none"


def _only(ids: list[int]) -> Callable[[Tensor], Tensor]:
    """The gradient with zeros in all other rows; of a sparse one, without them."""

    def masked(gradient: Tensor) -> Tensor:
        here = torch.tensor(ids, device=gradient.device)
        if not gradient.is_sparse:
            kept = torch.zeros_like(gradient)
            kept[here] = gradient[here]
            return kept
        gradient = gradient.coalesce()
        read = torch.isin(gradient.indices()[0], here)
        parts = gradient.indices()[:, read], gradient.values()[read]
        return torch.sparse_coo_tensor(*parts, gradient.shape, check_invariants=False)

    return masked
