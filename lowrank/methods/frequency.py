"""Embeddings weighted by token frequency: frequent tokens are approximated better.

min Σ_t p_t ‖e_t − ê_t‖² over tables Ê of rank r, where p_t is the frequency of token t in the
calibration, a third of it spread evenly so that every row counts (linalg/tokens.py). The optimum is
Ê = E P Pᵀ with P the r leading eigenvectors of Eᵀ diag(p) E: rows are projected, not scaled and
scaled back, so nothing is divided by a frequency. Weighted low rank with row weights has this
closed form (Srebro and Jaakkola, ICML 2003); OFA (arXiv 2311.08849) factors its tables unweighted.

For a table tied to the output head, the curve has the error of lookups and logits (see
linalg/tokens.py), but only that of lookups is minimised: `head-aware` minimises the sum.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .. import linalg
from ..types import Curve, Option, Site, Statistics
from ..walk import layouts
from .common import freq_of, low_rank_curve, rank_of, table_layer


@dataclass(frozen=True)
class Frequency:
    """No options; deterministic, so `seed` has no effect."""

    seed: int = 0
    kinds = frozenset({"embedding"})
    needs = frozenset({"freq"})

    def curve(self, site: Site, stats: Statistics) -> Curve:
        table = layouts.matrix(site.module)
        weights = linalg.token_weights(freq_of(stats, table.shape[0]))
        metric = linalg.output_metric(stats.gram, table.shape[1])
        energy = linalg.token_energies(table, weights, seen_in=metric)
        return low_rank_curve(
            site,
            "frequency",
            linalg.tails(energy).tolist(),
            spectrum=energy.sort(descending=True).values.sqrt().cpu(),
            norm="output",
            exact=True,
        )

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        table, rank = layouts.matrix(module), rank_of(option, module)
        weights = linalg.token_weights(freq_of(stats, table.shape[0]))
        return table_layer(module, *linalg.factor_tokens(table, rank, weights))
