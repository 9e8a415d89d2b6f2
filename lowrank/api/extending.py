"""`extend_vocabulary`: new tokens for a model whose tables may be factored."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowrankError, listed, unknown
from ..linalg.neighbours import Mixture, drawn_rows, mixed_rows, nearest_mixture
from ..tables import aligned
from ..walk.checks import check_model, ordinary_tensors
from ..walk.vocabulary import other_tables, token_rows

STARTS = ("subwords", "mean", "random")
Similar = str | Mapping[str, Sequence[str | int] | Mapping[Any, float]]
SHOWN = 20  # tokens in print
NEEDED = ("add_tokens", "convert_tokens_to_ids", "get_vocab")


@dataclass(frozen=True)
class NewToken:
    """One token.

    Attributes:
        like: the old tokens that its numbers were mixed from, with their shares; empty where they
            were drawn, or are the mean of all.
    """

    text: str
    id: int
    like: Mapping[str, float]


@dataclass(frozen=True)
class Extension:
    """What `extend_vocabulary` did.

    Attributes:
        rows: of the model's tables, before and after.
        numbers: of the new tokens; a dense table's are rows, a factored one's coordinates.
        start: "subwords", "mean", "random" or "similar".
        untouched: other embeddings with as many rows as the table had, which have not grown.
    """

    tokens: tuple[NewToken, ...]
    rows: tuple[int, int]
    numbers: int
    start: str
    untouched: tuple[str, ...] = ()

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def drawn(self) -> tuple[str, ...]:
        """The tokens whose numbers are random: all, or those without any known subword."""
        mean = self.start == "mean"
        return tuple(token.text for token in self.tokens if not token.like and not mean)

    def __str__(self) -> str:
        (before, after), more = self.rows, len(self.tokens) - SHOWN
        none = "the mean of all" if self.start == "mean" else "none: drawn"
        table = [
            {
                "token": repr(token.text),
                "id": str(token.id),
                "like": ", ".join(f"{old} {share:.2f}" for old, share in token.like.items())
                or none,
            }
            for token in self.tokens[:SHOWN]
        ]
        lines = [
            f"{len(self.tokens)} tokens, {self.numbers:,} numbers; {before:,} -> {after:,} rows",
            *aligned(table),
        ]
        lines += [f"… (+{more} more)"] if more > 0 else []
        if self.untouched:
            lines.append(f"of as many rows, and left as they are: {', '.join(self.untouched)}")
        return "\n".join(lines)


@ordinary_tensors()
def extend_vocabulary(
    model: nn.Module,
    tokenizer: Any,
    new_tokens: Sequence[Any],
    *,
    similar: Similar = "subwords",
    pad_to_multiple_of: int | None = None,
    seed: int = 0,
) -> Extension:
    """Add tokens to a tokenizer, and numbers for them to the embedding and the head of a model.

    A factored table gets new coordinates; its basis stays, for old and new tokens alike (UNKs
    Everywhere, arXiv 2012.15562). They are mixed from those of similar old tokens (OFA, arXiv
    2311.08849). A dense table gets rows, which are mixed in the same way. The logits of old tokens
    stay what they were. `only_tokens` then trains the new numbers alone.

    Args:
        model: of transformers, compressed, loaded or dense; changed in place.
        tokenizer: of transformers; the tokens are added to it.
        new_tokens: texts, or transformers' `AddedToken`. A text is found anywhere, within words
            too, but as `AddedToken(text, single_word=True)`; with a space before it where words
            of the tokenizer begin with one.
        similar: how their numbers start. "subwords": equal parts of the tokens that the text was
            split into so far. "mean": of all old tokens. "random": drawn, each coordinate from the
            mean and deviation of the old ones. Or for each text its similar old tokens (texts or
            ids): a list, in equal parts, or a mapping to similarities such as cosines of word
            vectors, of which the ten largest are weighted by the softmax of ten times the value;
            texts that are not in it start from their subwords.
        pad_to_multiple_of: of the number of rows, as in `resize_token_embeddings`. Rows that are
            no token's are the mean.
        seed: of the draws, which are also for texts without any known subword.

    Raises:
        LowrankError: a token is known already or would not be found, `similar` names what is not
            there, or a table or head has no row for each token; nothing is changed then.
    """
    check_model(model)
    rows = token_rows(model)
    before = len(rows[0])
    old = _Old.of(tokenizer, before)
    ids = _new_ids(old, new_tokens)
    known = torch.tensor(sorted(i for i in set(old.ids.values()) if i < before))
    mixtures = _mixtures(old, ids, similar)
    untouched = other_tables(model, rows)
    size = max(before, *(i + 1 for i in ids.values()))
    _resize(model, rows[0], size, pad_to_multiple_of)
    tokenizer.add_tokens(list(new_tokens))
    start = similar if isinstance(similar, str) else "similar"
    draw = torch.Generator().manual_seed(seed)
    rows = token_rows(model)
    for tensor in rows:
        _write(tensor, before, list(ids.values()), known, mixtures, start == "mean", draw)
    numbers = len(ids) * sum(tensor[0].numel() for tensor in rows)
    names = tokenizer.convert_ids_to_tokens(range(before))
    tokens = tuple(
        NewToken(text, i, {names[old]: share for old, share in (mixture or {}).items()})
        for (text, i), mixture in zip(ids.items(), mixtures, strict=True)
    )
    return Extension(tokens, (before, len(rows[0])), numbers, start, tuple(untouched))


@dataclass(frozen=True)
class _Old:
    """The vocabulary before."""

    tokenizer: Any
    ids: Mapping[str, int]
    rows: int

    @classmethod
    def of(cls, tokenizer: Any, rows: int) -> _Old:
        if not callable(tokenizer) or not all(hasattr(tokenizer, name) for name in NEEDED):
            got = type(tokenizer).__name__
            raise LowrankError(f"expected a tokenizer of transformers, got {got}")
        return cls(tokenizer, tokenizer.get_vocab(), rows)

    def knows(self, text: str) -> bool:
        """Whether it is one token, perhaps under another name, such as a space before a word."""
        ids = _encoded(self.tokenizer, text)
        return text in self.ids or (len(ids) == 1 and self.tokenizer.decode(ids) == text)

    def hidden_by(self, trial: Any, text: str, new: int) -> bool:
        """Whether a tokenizer with the text would read it for another token, of which it differs in
        what the normaliser removes, such as case."""
        ids = _encoded(self.tokenizer, text)
        return len(ids) == 1 and new in _encoded(trial, self.tokenizer.decode(ids))

    def pieces(self, text: str) -> Mixture | None:
        """Equal parts of the tokens that a text is split into; None if it knows none of them."""
        unknown_id = self.tokenizer.unk_token_id
        ids = [i for i in _encoded(self.tokenizer, text) if i != unknown_id and i < self.rows]
        return {i: ids.count(i) / len(ids) for i in ids} or None

    def named(self, name: str | int) -> Mixture | None:
        """A token by its id or its name in the vocabulary; else those of a text."""
        row = self.ids.get(name) if isinstance(name, str) else int(name)
        found = self.pieces(str(name)) if row is None else {row: 1.0}
        return found if found and all(0 <= row < self.rows for row in found) else None

    def mixture(self, text: str, like: Any) -> Mixture:
        """Of the old tokens that the user names for one text."""
        names = [like] if isinstance(like, str | int) else list(like)
        parts = [self.named(name) for name in names]
        if not parts or None in parts:
            what = f"{names[parts.index(None)]!r}, which is no token of the model," if parts else ""
            raise LowrankError(f"similar names {what or 'no old token'} for {text!r}")
        shares = dict.fromkeys(range(len(names)), 1 / len(names))
        if isinstance(like, Mapping):
            shares = nearest_mixture({place: float(like[name]) for place, name in enumerate(names)})
        mixture: dict[int, float] = {}
        for place, share in shares.items():
            for row, part in (parts[place] or {}).items():
                mixture[row] = mixture.get(row, 0.0) + share * part
        return mixture


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _new_ids(old: _Old, new_tokens: Sequence[Any]) -> dict[str, int]:
    """The id that each text will have, asked of a copy of the tokenizer."""
    if isinstance(new_tokens, str):
        raise LowrankError(f"expected a list of texts, got the text {new_tokens!r}")
    texts = [str(token) for token in new_tokens]
    twice = [text for text, count in Counter(texts).items() if count > 1]
    if not texts or twice or "" in texts:
        wrong = f"{listed(map(repr, twice), 3)} again" if twice else f"{texts!r}"
        raise LowrankError(f"new_tokens must be texts, each once, got {wrong}")
    trial = copy.deepcopy(old.tokenizer)
    trial.add_tokens(list(new_tokens))
    ids = dict(zip(texts, trial.convert_tokens_to_ids(texts), strict=True))
    had = [text for text in texts if old.knows(text) or old.hidden_by(trial, text, ids[text])]
    if had:
        raise LowrankError(
            f"{len(had)} of {len(texts)} tokens are in the vocabulary already "
            f"({listed(map(repr, had), 3)}): leave them out"
        )
    taken = set(old.ids.values())
    lost = [text for text, i in ids.items() if i in taken or i not in _encoded(trial, text)]
    if lost:
        raise LowrankError(
            f"the tokenizer does not find {listed(map(repr, lost), 3)} as one token once it is "
            "added: write it as its normalisation leaves it, or add it as an AddedToken"
        )
    return ids


def _mixtures(old: _Old, texts: Collection[str], similar: Similar) -> list[Mixture | None]:
    """What each text is mixed from; None where it is like no token."""
    if isinstance(similar, str):
        if similar not in STARTS:
            raise unknown("similar", similar, STARTS)
        return [old.pieces(text) if similar == "subwords" else None for text in texts]
    strangers = [str(text) for text in similar if text not in texts]
    if strangers:
        raise LowrankError(f"similar names no new token: {listed(map(repr, strangers), 3)}")
    return [
        old.mixture(text, similar[text]) if text in similar else old.pieces(text) for text in texts
    ]


def _resize(model: Any, table: Tensor, size: int, multiple: int | None) -> None:
    """transformers' resizing, whose draws are thrown away."""
    devices = [table.device] if table.device.type == "cuda" else []
    if size == len(table) and multiple is None:
        return
    with torch.random.fork_rng(devices):
        model.resize_token_embeddings(size, pad_to_multiple_of=multiple, mean_resizing=False)


@torch.no_grad()
def _write(
    tensor: Tensor,
    before: int,
    ids: list[int],
    known: Tensor,
    mixtures: Sequence[Mixture | None],
    mean: bool,
    draw: torch.Generator,
) -> None:
    """The rows of new tokens, and the mean in those that are no token's."""
    old = tensor[known.to(tensor.device)]
    precise = torch.promote_types(tensor.dtype, torch.float32)
    middle = old.mean(0, dtype=precise).to(tensor)
    tensor[before:] = middle
    drawn = middle.expand(len(ids), *middle.shape)
    if not mean and None in mixtures:
        drawn = drawn_rows(old, len(ids), draw)
    mixed = mixed_rows(tensor, [mixture or {} for mixture in mixtures])
    for place, (row, mixture) in enumerate(zip(ids, mixtures, strict=True)):
        tensor[row] = mixed[place] if mixture else drawn[place]
