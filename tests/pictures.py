"""A made-up model of any number of layers: its plan, report, inspection and sensitivities."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from lowrank import Plan, Report
from lowrank.diagnose import Inspected, Inspection, LayerSpectrum, Sensitivity
from lowrank.plans.entry import Entry, break_even
from lowrank.plans.report import Measured
from lowrank.types import Cost

KINDS = {
    "self_attn.q_proj": (768, 768), "self_attn.k_proj": (256, 768), "self_attn.v_proj": (256, 768),
    "self_attn.o_proj": (768, 768), "mlp.gate_proj": (2048, 768), "mlp.up_proj": (2048, 768),
    "mlp.down_proj": (768, 2048),
}  # fmt: skip


def cost(numbers: int) -> Cost:
    return Cost(numbers, 2 * numbers, numbers)


def entry(name: str, shape: tuple[int, int], share: float) -> Entry:
    """Of a rank that is about this share of break-even; above 0.95 it stays dense."""
    rank, dense = max(int(share * break_even(shape)), 1), cost(shape[0] * shape[1])
    if share > 0.95:
        return Entry((name,), shape, dense, "dense", None, "dense", dense, 0.0, 100.0, "output",
                     True, reason="the policy keeps it dense")  # fmt: skip
    return Entry((name,), shape, dense, "whitened", (rank,), "factors", cost(rank * sum(shape)),
                 10 * (1 - share), 100.0, "output", True)  # fmt: skip


def made(layers: int = 100, *, names: list[str] | None = None) -> SimpleNamespace:
    """`layers` layers in blocks of seven kinds, or of these names."""
    kinds = list(KINDS.items())
    named = [
        (f"model.layers.{i // 7}.{kinds[i % 7][0]}", kinds[i % 7][1]) for i in range(layers)
    ] if names is None else [(name, (64, 64)) for name in names]  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    shares = (0.2 + 0.8 * torch.rand(len(named), generator=generator)).tolist()
    entries = tuple(entry(*each, share) for each, share in zip(named, shares, strict=True))
    settings = {"method": "whitened", "policy": "spectrum", "tokens": 22171, "seed": 0}
    whole = cost(sum(e.dense.params for e in entries) + 1000)
    asked = {"ratio": 0.6, "of": "targets", "unit": "params"}
    plan = Plan(entries, whole, asked, settings)
    sites = tuple(
        Measured(e.name, "output", e.error, e.error, 1.05 * (e.error or 0), 100.0, 0.1)
        for e in entries
        if e.size is not None
    )
    after = cost(sum(e.cost.params for e in entries) + 1000)
    report = Report(plan, sites, plan.kept(), plan.kept_of_model(), whole.params, after.params,
                    whole.bytes, after.bytes, 12.3, 22171, 0, {"torch": "2"})  # fmt: skip
    looked = tuple(
        Inspected(
            name, shape, shape[0] * shape[1], LayerSpectrum(energy), LayerSpectrum(energy**1.3)
        )
        for (name, shape), share in zip(named, shares, strict=True)
        for energy in [torch.arange(1, min(shape) + 1).double() ** (-1 - share)]
    )
    kl = torch.rand(len(named), 3, generator=generator).double() * torch.tensor([0.01, 0.1, 1.0])
    found = Sensitivity(tuple(n for n, _ in named), (0.9, 0.7, 0.5), kl, (kl * 0).long(), kl,
                        "whitened", 4096, tuple((n,) for n, _ in named))  # fmt: skip
    return SimpleNamespace(plan=plan, report=report, inspection=Inspection(looked, 22171, ""),
                           sensitivity=found)  # fmt: skip
