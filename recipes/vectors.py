"""Search by inner product in fewer dimensions: LeanVec's two maps beside the PCA of the base.

The base are the rows of a language model's head, the queries its last hidden states, so that the
ten best of a query are the ten likeliest tokens: queries that lie elsewhere than what is searched.
And beside them hidden states searched by hidden states, which lie in one place. The maps see hidden
states of calibration text; recall of the ten best is measured on held-out text.

    python recipes/vectors.py      # seconds

LeanVec's abstract (arXiv 2312.16335) claims better accuracy than without regard to queries where
these are distributed otherwise, and competitive results where they are not.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

import lowrank
from lowrank.demo import tiny_lm
from lowrank.linalg.vectors import VectorProjection


@torch.no_grad()
def hidden(model: Any, tokenizer: Any, text: str, most: int) -> Tensor:
    """Last hidden states of a text, (tokens, D)."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:most])
    rows = ids[: len(ids) // 256 * 256].view(-1, 256)
    return torch.cat([model.model(input_ids=part).last_hidden_state for part in rows.split(8)])


def pca(base: Tensor, dim: int) -> VectorProjection:
    top = torch.linalg.eigh((base.T @ base).double()).eigenvectors[:, -dim:].T
    return VectorProjection(top, top, float("nan"))


def recall(found: VectorProjection, base: Tensor, queries: Tensor) -> float:
    """The share of the ten best by inner product that the projection's ten best hold."""
    exact = (queries @ base.T).topk(10).indices
    short = (found.of_queries(queries) @ found.of_base(base).T).topk(10).indices
    return float((exact[:, :, None] == short[:, None]).any(-1).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--damps", type=float, nargs="+", default=[0.0, 0.01, 0.1])
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    tiny = tiny_lm()
    seen, asked = (
        hidden(tiny.model, tiny.tokenizer, text, options.tokens).flatten(0, 1)
        for text in (tiny.calibration, tiny.held_out)
    )
    table = tiny.model.lm_head.weight.detach()
    beds = {
        "head, by hidden states": (table, seen, asked[::4]),
        "hidden states, by others": (seen[::2], seen[1::2], asked[::4]),
    }
    print(f"{'base, queries':26}{'maps':24}" + "".join(f"{dim:>8}" for dim in options.dims))
    for name, (base, sample, queries) in beds.items():
        for centred in (False, True):
            moved = base - base.mean(0) if centred else base
            ways: dict[str, Any] = {"PCA": lambda dim, x=moved: pca(x, dim)}
            for damp in options.damps:
                ways[f"LeanVec, {damp:g}"] = lambda dim, x=moved, q=sample, damp=damp: (
                    lowrank.project_vectors(x, q, dim, damp=damp)
                )
            for way, fit in ways.items():
                said = f"{way}{', centred' if centred else ''}"
                found = [recall(fit(dim), moved, queries) for dim in options.dims]
                print(f"{name:26}{said:24}" + "".join(f"{r:8.3f}" for r in found), flush=True)


if __name__ == "__main__":
    main()
