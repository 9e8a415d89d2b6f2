"""Rows for new tokens out of those of similar ones (OFA, arXiv 2311.08849).

f_t = Σ wᵢ fᵢ over old tokens i, with w the softmax of their similarities over a temperature. A
mixture of rows is linear, so that of a table E = F G the coordinates F are mixed, and the rows of
the product with them: G, the basis, serves old and new tokens alike (UNKs Everywhere, arXiv
2012.15562). A token that is like none is drawn, each coordinate from its own mean and deviation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

NEAREST = 10
TEMPERATURE = 0.1
Mixture = Mapping[int, float]  # row -> share; shares add up to 1


def nearest_mixture(
    similarities: Mapping[int, float], nearest: int = NEAREST, temperature: float = TEMPERATURE
) -> dict[int, float]:
    """Softmax of the `nearest` largest similarities (cosines) over the temperature.

    Args:
        similarities: by row; of equal ones the first given is taken.
    """
    best = sorted(similarities.items(), key=lambda item: -item[1])[:nearest]
    values = torch.tensor([value for _, value in best], dtype=torch.float64)
    shares = torch.softmax(values / temperature, 0).tolist()
    return dict(zip((row for row, _ in best), shares, strict=True))


def mixed_rows(table: Tensor, mixtures: Sequence[Mixture]) -> Tensor:
    """Σ share · row for every mixture, in float64 and rounded once.

    Args:
        table: (V, …), such as coordinates (V, rank) or a bias (V,).

    Returns:
        (len(mixtures), …), with the dtype and device of the table.
    """
    rows = [row for mixture in mixtures for row in mixture]
    places = [place for place, mixture in enumerate(mixtures) for _ in mixture]
    shares = [share for mixture in mixtures for share in mixture.values()]
    read = table.detach()[torch.tensor(rows, dtype=torch.long, device=table.device)].cpu().double()
    weights = torch.tensor(shares, dtype=torch.float64).view(-1, *[1] * (table.ndim - 1))
    total = torch.zeros(len(mixtures), *table.shape[1:], dtype=torch.float64)
    return total.index_add_(0, torch.tensor(places, dtype=torch.long), read * weights).to(table)


def drawn_rows(table: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows drawn from the normal distribution of each coordinate by itself, (count, …).

    Args:
        generator: of the CPU, so that every device draws the same.
    """
    precise = table.detach().to(torch.promote_types(table.dtype, torch.float32))
    deviation, mean = torch.std_mean(precise, dim=0, correction=0)
    drawn = torch.randn(count, *table.shape[1:], generator=generator)
    return (mean + deviation * drawn.to(mean)).to(table)
