"""Embeddings tied to the output head: the errors of lookups and of logits in one norm.

min Σ_t p_t (¾ ‖δ_t‖² + ¼ δ_tᵀ H δ_t · D / tr H) over tables Ê of rank r, δ_t the rows of E − Ê,
H = E[h hᵀ] of the head's input h, p_t as in `frequency`. The first part is the error of a looked-up
row, the second that of its logit δ_t·h, scaled so that h has mean square 1 per coordinate; ¼ was
the best of ¼, ½, ¾ on the embedded model. Both are weighted by token frequency: to second order,
the KL weights the error of a logit by the probability of its token, whose mean is p_t (assuming
token and h independent). So one metric C = ¾ I + ¼ H · D / tr H serves both, and
Ê = (E C^½ V)(C^{-½} V)ᵀ, V the leading eigenvectors of C^½ Eᵀ diag(p) E C^½, is the exact optimum
of the sum above (linalg/tokens.py).

Without a tied head C = I, which is `frequency`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .. import linalg
from ..types import Curve, Option, Site, Statistics
from ..walk import layouts
from .common import freq_of, low_rank_curve, rank_of, table_layer


@dataclass(frozen=True)
class HeadAware:
    """No options; deterministic, so `seed` has no effect."""

    seed: int = 0
    kinds = frozenset({"embedding"})
    needs = frozenset({"freq"})

    def curve(self, site: Site, stats: Statistics) -> Curve:
        table = layouts.matrix(site.module)
        weights = linalg.token_weights(freq_of(stats, table.shape[0]))
        metric = linalg.output_metric(stats.gram, table.shape[1])
        energy = linalg.token_energies(table, weights, metric)
        return low_rank_curve(
            site,
            "head-aware",
            linalg.tails(energy).tolist(),
            spectrum=energy.sqrt().cpu(),
            norm="output",
            exact=True,
        )

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        table, rank = layouts.matrix(module), rank_of(option, module)
        weights = linalg.token_weights(freq_of(stats, table.shape[0]))
        metric = linalg.output_metric(stats.gram, table.shape[1])
        return table_layer(module, *linalg.factor_tokens(table, rank, weights, metric))
