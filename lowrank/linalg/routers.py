"""Routers by imitation: which experts come nearest to the dense output, and a linear guess of it.

FactorLLM (arXiv 2408.11855) labels each token by the k experts of smallest error alone, and trains
on the softmax of that 0/1 label, which is nearly flat. Here the label is the subset that is left
when experts are dropped one by one, each where the output loses least, and the guess is a
regression on it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

RIDGE = 1e-2  # relative to the mean energy of a feature
DECAY = 1e-4  # of the squared weights of one expert
DOUBT = 0.01
STEPS = 60


def nearest_experts(grams: Tensor, active: int) -> Tensor:
    """True at the experts of each input whose sum comes near to the sum of all: (n, experts).

    Args:
        grams: (n, experts, experts): inner products of the experts' outputs.
        active: experts that stay.
    """
    energy = grams.diagonal(dim1=1, dim2=2)
    on = torch.ones_like(energy, dtype=torch.bool)
    for _ in range(grams.shape[1] - active):
        off = (~on).to(grams)
        # What the error grows by if this one goes too.
        growth = energy + 2 * torch.einsum("nij,nj->ni", grams, off)
        dropped = growth.masked_fill(~on, torch.inf).argmin(1)
        on[torch.arange(len(on), device=on.device), dropped] = False
    return on


def missed(grams: Tensor, on: Tensor) -> Tensor:
    """Squared norm of what the experts that are off would add: (n,)."""
    off = (~on).to(grams)
    return torch.einsum("ni,nij,nj->n", off, grams, off)


def least_squares(x: Tensor) -> Callable[[Tensor], Tensor]:
    """By which targets (n, k) become what a linear map of x (n, in), with a bias, makes of them."""
    rest, inverse = _normal(x)

    def guess(targets: Tensor) -> Tensor:
        mean = targets.mean(0)
        return rest @ (inverse @ (targets - mean)) + mean

    return guess


def fitted_router(x: Tensor, grams: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """Weight (experts, in) and bias (experts,) of a linear router: a logistic regression of
    `nearest_experts` on the inputs, each expert by itself, started from least squares.

    Args:
        x: (n, in), float32 or better.
        grams: (n, experts, experts), see `nearest_experts`.
    """
    # Certainty would send the bias of an expert that is always on to infinity.
    wanted = nearest_experts(grams, active).to(x).clamp(DOUBT, 1 - DOUBT)
    share = wanted.mean(0)
    slope = (_normal(x)[1] @ (wanted - share)).T  # (experts, in)
    # The slope of a sigmoid at zero is a quarter.
    weight = (4 * slope).contiguous().requires_grad_()
    bias = (4 * (share - slope @ x.mean(0) - 0.5)).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        loss = F.binary_cross_entropy_with_logits(x @ weight.T + bias, wanted)
        loss = loss + DECAY * weight.square().sum() / len(weight)
        weight.grad, bias.grad = torch.autograd.grad(loss, (weight, bias))
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def _normal(x: Tensor) -> tuple[Tensor, Tensor]:
    """x without its mean (n, in), and what makes slopes (in, k) of centred targets (n, k)."""
    rest = x - x.mean(0)
    second = rest.T @ rest / len(x)
    second.diagonal().add_(RIDGE * float(second.diagonal().mean()) or 1.0)  # or all rows are alike
    return rest, torch.linalg.solve(second, rest.T / len(x))
