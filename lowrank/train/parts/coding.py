"""What STF starts from: its sites, their sizes, and the latent's first numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...nn import DenseSparseLinear, dense_sparse_cost
from ...nn.dense_sparse import MOST
from ...types import Site
from ...walk.sites import find_sites

CodeSize = tuple[int, int]  # r, s
BELOW = 0.99  # of the smallest chosen entry of a row: what others start with at most


def first_latent(weight: Tensor, coefficients: Tensor, basis: Tensor) -> Tensor:
    """Z (out, r): C on its support, and elsewhere what W − C D has on the atoms, kept below it."""
    length = basis.norm(dim=1)
    rest = (weight - coefficients @ basis) @ basis.T / length.square().where(length > 0, 1)
    chosen = coefficients != 0
    size = (coefficients.abs() * length).masked_fill(~chosen, torch.inf)
    most = BELOW * size.amin(1, keepdim=True) / length.where(length > 0, 1)  # inf of a zero row
    most = torch.where(most.isfinite(), most, 0)
    return torch.where(chosen, coefficients, rest.clamp(-most, most))


def size_rule(
    ratio: float | None, rank: int | None, density: float
) -> Callable[[Site], CodeSize | None]:
    """A function that gives r and s of a dense site; None where they would not be smaller."""

    def size(site: Site) -> CodeSize | None:
        itemsize = site.cost.bytes // site.cost.params
        most = min(rank or site.shape[0], MOST)
        limit = site.cost.bytes * ratio if ratio is not None else site.cost.bytes - 1
        for atoms in range(most, 0 if ratio is not None else most - 1, -1):
            count = max(1, round(density * atoms))
            if dense_sparse_cost(*site.shape, atoms, count, itemsize=itemsize).bytes <= limit:
                return atoms, count
        return None

    return size if ratio is not None or rank is not None else lambda site: None


def coded_sites(root: nn.Module, size: Callable[[Site], CodeSize | None]) -> list[Site]:
    """Dense sites, with a reason where `size` gives none, and layers that are dense-sparse."""
    sites = []
    for site in find_sites(root):
        reason = site.reason
        if not reason and site.kind == "linear" and size(site) is None:
            reason = "a dense layer: no ratio or rank that makes it smaller was given"
        sites.append(dataclasses.replace(site, reason=reason))
    names: dict[int, list[str]] = {}
    modules = {}
    for name, module in root.named_modules(remove_duplicate=False):
        if isinstance(module, DenseSparseLinear):
            names.setdefault(id(module), []).append(name)
            modules[id(module)] = module
    for key, m in modules.items():
        every = tuple(names[key])
        shape = (m.out_features, m.in_features)
        sites.append(Site(every[0], every, "linear", (m,), shape, m.cost()))
    return sites
