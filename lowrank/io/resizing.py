"""Let transformers' `resize_token_embeddings` resize factored tables and heads.

It resizes one nn.Embedding and one nn.Linear. In a factored table these are `rows`, in a factored
head `up`: the coordinates of new tokens are drawn as transformers would draw their embeddings, from
the mean and covariance of the old ones, which is the same of what they stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import LowrankError
from ..nn import Form, LowRankEmbedding, LowRankLinear, TiedEmbedding, TiedHead
from ..nn.table_form import TableForm

Resize = Callable[..., Any]


def resize_all(
    resize: Resize, model: Any, new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """`PreTrainedModel._resize_token_embeddings`; what is tied to a factored table remains so.

    Models such as T5 put the resized table into each place, where it would be saved again. And
    transformers makes a layer trainable as a whole if its weight is: a basis that is frozen beside
    coordinates that are trained stays frozen.

    Raises:
        LowrankError: the table or the head cannot be resized; neither is then.
    """
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    forms = [end for end in ends if isinstance(end, Form)]
    for form in forms if new_num_tokens or pad_to_multiple_of else []:
        _check(_has_rows(form), form)
    trained = [{n: p.requires_grad for n, p in form.named_parameters()} for form in forms]
    tied = [
        (parent, key, child)
        for parent in model.modules()
        for key, child in parent._modules.items()
        if isinstance(child, TiedEmbedding)
    ]
    try:
        return resize(model, new_num_tokens, pad_to_multiple_of, *args, **kwargs)
    finally:
        for parent, key, child in tied:
            parent._modules[key] = child
        for form, flags in zip(forms, trained, strict=True):
            for name, parameter in form.named_parameters():
                parameter.requires_grad_(flags[name])


def resize_table(resize: Resize, model: Any, old: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`PreTrainedModel._get_resized_embeddings`, for factored tables too: changed in place.

    Raises:
        LowrankError: what holds the coordinates is no plain embedding.
    """
    if isinstance(old, TableForm):
        _check(_has_rows(old), old)
    if not isinstance(old, LowRankEmbedding | TiedEmbedding):
        return resize(model, old, *args, **kwargs)
    table = old.owner if isinstance(old, TiedEmbedding) else old
    _check(_has_rows(table), old)
    resize(model, table.rows, *args, **kwargs)
    table.num_embeddings = table.rows.num_embeddings
    for reader in model.modules():
        if isinstance(reader, TiedEmbedding | TiedHead) and reader.owner is table:
            reader.num_embeddings = table.num_embeddings
    return old


def resize_head(
    resize: Resize, model: Any, old: nn.Module, new_num_tokens: int | None = None,
    transposed: bool = False, mean_resizing: bool = True,
) -> Any:  # fmt: skip
    """`PreTrainedModel._get_resized_lm_head`, for factored heads too: changed in place.

    Raises:
        LowrankError: the head's form has no rows of its own for each token.
    """
    if not isinstance(old, Form) or new_num_tokens is None:
        return resize(model, old, new_num_tokens, transposed, mean_resizing)
    if isinstance(old, TiedHead):  # its table was resized before it
        if old.bias is not None:
            old.bias = _longer(old.bias, new_num_tokens, mean_resizing)
        return old
    _check(_has_rows(old), old)
    old.up = resize(model, old.up, new_num_tokens, transposed, mean_resizing)
    return old


def _longer(bias: nn.Parameter, length: int, mean: bool) -> nn.Parameter:
    """The bias, cut or filled up with its mean or with zeros."""
    if len(bias) == length:
        return bias
    with torch.no_grad():
        fresh = bias.new_zeros(length)
        if mean:
            fresh += bias.float().mean()
        kept = min(length, len(bias))
        fresh[:kept] = bias[:kept]
    return nn.Parameter(fresh, bias.requires_grad)


def _has_rows(form: Form) -> bool:
    """Whether what holds a token's coordinates is a plain embedding or linear layer of numbers:
    quantized ones would be lost."""
    if isinstance(form, TiedEmbedding | TiedHead):
        form = form.owner
    rows: Any = form.rows if isinstance(form, LowRankEmbedding) else getattr(form, "up", None)
    kind = nn.Embedding if isinstance(form, LowRankEmbedding) else nn.Linear
    plain = type(form) in (LowRankEmbedding, LowRankLinear) and type(rows) is kind
    return plain and type(rows.weight) is nn.Parameter


def _check(can: bool, layer: nn.Module) -> None:
    if not can:
        raise LowrankError(
            f"a {type(layer).__name__} cannot be resized: resize the model first and compress it "
            "then, or merge it (lowrank.to_dense), resize, and compress again"
        )
