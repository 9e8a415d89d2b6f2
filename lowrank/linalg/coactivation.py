"""Neurons in equal groups, such that each input needs few of them, and a linear rule knows which.

The share of an output that a group misses is what its neurons would have added. For fixed groups an
input takes those of the largest energy; for fixed choices a neuron is best in the group that is
chosen where it is active: the two steps alternate, as in k-means, with groups of equal size. The
last rounds take the choices of a linear guess, as a router will make them, in the place of the best
ones: groups that nobody can foresee are of no use.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from .routers import least_squares

ROUNDS = 40
PATIENCE = 3  # rounds without a gain
STARTS = 3

Choice = Callable[[Tensor], Tensor]  # energy held by the groups (n, groups) -> scores of the groups


def coactive_groups(
    energy: Tensor, groups: int, active: int, *, inputs: Tensor | None = None, seed: int = 0
) -> Tensor:
    """The group of each neuron: (neurons,) int64, `groups` of equal size, the most chosen first, so
    that those chosen together are often neighbours, which is one slice.

    The best of a few starts is taken, and of their rounds, by the energy that the chosen groups
    hold.

    Args:
        energy: (n, neurons), not negative: what each neuron adds to the output of each input.
        groups: a divisor of the number of neurons.
        active: groups that an input may choose.
        inputs: (n, in), of which choices are to be linear guesses; None for the best choices.
    """
    draw = torch.Generator().manual_seed(seed)
    share = energy / energy.sum(1, keepdim=True).clamp(min=torch.finfo(energy.dtype).tiny)
    starts = (_start(share, groups, draw) for _ in range(STARTS))
    tried = [_alternated(share, labels, groups, active, _largest) for labels in starts]
    best, _ = max(tried, key=lambda each: each[1])
    choice: Choice = _largest
    if inputs is not None:
        choice = _foreseen(inputs.to(share), active)
        best, _ = _alternated(share, best, groups, active, choice)
    often = _chosen(choice(share @ one_hot(best, groups).to(share)), active).sum(0)
    return often.argsort(descending=True, stable=True).argsort().cpu()[best]


def _largest(held: Tensor) -> Tensor:
    return held


def _foreseen(inputs: Tensor, active: int) -> Choice:
    """What a linear map of the inputs makes of the best choices."""
    guess = least_squares(inputs)
    return lambda held: guess(_chosen(held, active))


def balanced(scores: Tensor) -> Tensor:
    """An assignment (items,) to equal groups of high total score (items, groups).

    Items ask for their best open group; a group that is asked by more than it holds takes those
    that lose most elsewhere, and closes.
    """
    items, groups = scores.shape
    labels = torch.full((items,), -1)
    room = [items // groups] * groups
    scores = scores.cpu()
    while bool((labels < 0).any()):
        left = (labels < 0).nonzero().flatten()
        closed = torch.tensor([r == 0 for r in room])
        values, wanted = scores[left].masked_fill(closed, -torch.inf).topk(min(2, groups), dim=1)
        loss = values[:, 0] - values[:, -1]
        for group in range(groups):
            asking = (wanted[:, 0] == group).nonzero().flatten()
            taken = asking[loss[asking].argsort(descending=True, stable=True)][: room[group]]
            labels[left[taken]] = group
            room[group] -= len(taken)
    return labels


def _alternated(
    share: Tensor, labels: Tensor, groups: int, active: int, choice: Choice
) -> tuple[Tensor, float]:
    """The best groups of the rounds from these on, and the energy that the chosen ones hold."""
    best, most, idle = labels, -1.0, 0
    for _ in range(ROUNDS):
        held = share @ one_hot(labels, groups).to(share)  # (n, groups)
        chosen = _chosen(choice(held), active)
        captured = float((held * chosen).sum())
        idle = 0 if captured > most * (1 + 1e-6) else idle + 1
        if captured > most:
            best, most = labels, captured
        if idle >= PATIENCE:
            break
        labels = balanced(share.T @ chosen)
    return best, most


def _chosen(scores: Tensor, active: int) -> Tensor:
    """One at the groups of the highest scores, zero elsewhere."""
    return torch.zeros_like(scores).scatter_(1, scores.topk(active, dim=1).indices, 1.0)


def _start(share: Tensor, groups: int, draw: torch.Generator) -> Tensor:
    """Groups around neurons that are active at different inputs, drawn far from each other."""
    tiny = torch.finfo(share.dtype).tiny
    pattern = share.sqrt()
    pattern = pattern / pattern.norm(dim=0).clamp(min=tiny)
    weights = share.sum(0).cpu()
    seeds: list[int] = []
    nearest = torch.zeros_like(weights)
    for _ in range(groups):
        far = weights * (1 - nearest).clamp(min=1e-6)
        far[seeds] = 0.0
        far = far if float(far.sum()) > 0 else torch.ones_like(far)
        seeds.append(int(torch.multinomial(far, 1, generator=draw)))
        nearest = torch.maximum(nearest, (pattern.T @ pattern[:, seeds[-1]]).cpu())
    return balanced(pattern.T @ pattern[:, seeds])
