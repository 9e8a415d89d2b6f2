"""Every controller of linear layers, with options under which much happens in eighty steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from lowrank.train import (
    DLRT,
    DSL,
    GBLR,
    NM,
    SMMF,
    STF,
    CondLR,
    Cuttlefish,
    InRank,
    LoQT,
    Maestro,
    Pufferfish,
)
from tests.train.loops import Net, run

EPOCH = 8  # steps
BY_STEPS: dict[str, Callable[..., Any]] = {
    "dlrt": partial(DLRT, tolerance=0.25, every=7),
    "dlrt, budget": partial(DLRT, ratio=0.5, every=10, init="random"),
    "gblr": partial(GBLR, ratio=0.4, steps=48, start=0.8, rate=0.02),
    "condlr": partial(CondLR, tau=2.0, tolerance=0.3, every=25),
}
# Over plain factors, and LoQT.
BY_EPOCHS: dict[str, Callable[..., Any]] = {
    "maestro": partial(Maestro, lasso=3e-3, threshold=0.05),
    "maestro, all cut": partial(Maestro, lasso=3e-3, threshold=0.05, cut="all", seed=3),
    "loqt": partial(LoQT, rank=3, gap=9, growth=1.3),
    "inrank": partial(InRank, rank=1, buffer=1, warmup=5, every=5, share=0.8, steps=75),
    "cuttlefish": partial(
        Cuttlefish, max_epochs=4, min_epochs=3, window=2, smooth=3, frobenius_decay=0.1
    ),
    "nm": partial(NM, decay=60, dense=10),
    "nm, stepwise": partial(NM, decay=60, pattern=(1, 4), way="stepwise"),
    "dsl": partial(DSL, ratio=0.6, steps=64, every=6),
    "stf": partial(STF, ratio=0.7, decay=1e-3, freeze=73),
    "stf, weight": partial(STF, ratio=0.7, latent="weight", every=5),
    "gblr, smooth": partial(GBLR, ratio=0.4, steps=70, rate=0.02, strength=0.2, sigma=1.0),
    "pufferfish": partial(Pufferfish, epochs=7, frobenius_decay=1e-2),
}
CONTROLLERS = BY_STEPS | BY_EPOCHS
EVERY = pytest.mark.parametrize("name", CONTROLLERS)

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "sgd, decay": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.0),
    "adam, decay": partial(torch.optim.AdamW, lr=0.01),
    "adafactor": partial(torch.optim.Adafactor, lr=0.02),
    "smmf": partial(SMMF, lr=0.01),
}


def made(name: str, optimizer: str = "sgd", seed: int = 0) -> tuple[Any, Any, Any]:
    """A model, its optimizer, and the controller of this name on both."""
    model = Net(seed)
    live = OPTIMIZERS[optimizer](model.parameters())
    return model, live, CONTROLLERS[name](model, live)


def train(
    name: str, model: Any, live: Any, controller: Any, steps: int, start: int = 0
) -> list[float]:
    """Steps start…steps; the losses. Those that work by epochs are told of them."""

    def epoch(step: int) -> None:
        if name in BY_EPOCHS and (step + 1) % EPOCH == 0:
            controller.end_epoch()

    return run(model, live, controller, steps, start=start, each=epoch)
