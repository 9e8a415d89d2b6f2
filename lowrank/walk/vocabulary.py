"""Where a language model keeps its tokens: the tensors that have a row for each of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import LowrankError
from ..nn import LowRankEmbedding, LowRankLinear, TiedEmbedding, TiedHead
from ..nn.children import is_sharded

INSTEAD = (
    "do it before compressing (or to what lowrank.to_dense gives, and compress that again), or "
    'compress this layer with storage="factors"'
)


def ends_of(model: nn.Module) -> list[nn.Module]:
    """The embedding of the input and, where there is one, the head of a transformers model.

    Raises:
        LowrankError: the model does not say which layers these are, or has no embedding.
    """
    accessors = [getattr(model, f"get_{end}_embeddings", None) for end in ("input", "output")]
    if not all(map(callable, accessors)):
        raise LowrankError(
            f"a {type(model).__name__} does not say where its tokens are: expected a model of "
            "transformers (get_input_embeddings and get_output_embeddings)"
        )
    table, head = (accessor() for accessor in accessors)  # type: ignore[misc]
    if not isinstance(table, nn.Module):
        raise LowrankError(f"a {type(model).__name__} has no embedding of tokens")
    return [table] if head is None else [table, head]


def token_rows(model: nn.Module) -> list[nn.Parameter]:
    """The parameters whose first dimension runs over the tokens, each once: of a factored table its
    coordinates (V, rank), of a dense one the rows (V, D), of a head the biases (V,) too.

    Raises:
        LowrankError: see `rows_of` and `ends_of`; or the embedding and the head differ in length.
    """
    every = [rows for layer in ends_of(model) for rows in rows_of(layer)]
    lengths = sorted({len(rows) for rows in every})
    if len(lengths) > 1:
        raise LowrankError(
            f"the embedding and the head have rows for {' and '.join(map(str, lengths))} tokens: "
            "bring them to one number first (model.resize_token_embeddings)"
        )
    return list({id(rows): rows for rows in every}.values())


def rows_of(layer: nn.Module) -> list[nn.Parameter]:
    """The same of one embedding or head.

    Raises:
        LowrankError: its form has no row of its own for each token, or the rows cannot be written
            to: they are offloaded, sharded, or integers.
    """
    if isinstance(layer, TiedEmbedding | TiedHead):
        held: list[Any] = [getattr(layer.owner.rows, "weight", None), getattr(layer, "bias", None)]
    elif isinstance(layer, LowRankEmbedding):
        held = [getattr(layer.rows, "weight", None)]
    else:
        plain: Any = layer.up if isinstance(layer, LowRankLinear) else layer
        if not isinstance(plain, nn.Embedding | nn.Linear):
            raise LowrankError(
                f"a {type(layer).__name__} has no row of its own for each token: {INSTEAD}"
            )
        held = [plain.weight, getattr(plain, "bias", None)]
    found = [rows for rows in held if rows is not None]
    if not found or not all(map(_can_be_written, found)):
        raise LowrankError(
            f"the rows of {type(layer).__name__} are wrapped, quantized, sharded or offloaded, "
            "and none can be added to them: load the model whole and as floating-point numbers"
        )
    return found


def _can_be_written(rows: Tensor) -> bool:
    ordinary = type(rows) is nn.Parameter and not is_sharded(rows)
    return ordinary and rows.is_floating_point() and not rows.is_meta


def other_tables(model: nn.Module, known: list[nn.Parameter]) -> list[str]:
    """Names of further embeddings with as many rows as the model has tokens, such as a decoder's
    own one: nothing says whether these rows are tokens."""
    ours, count = {id(rows) for rows in known}, len(known[0])
    owners = {id(layer) for layer in ends_of(model)}
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Embedding)
        and layer.num_embeddings == count
        and id(layer.weight) not in ours
        and id(layer) not in owners
    ]
