"""Laws about side effects: a method reads, and two runs agree."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..types import Method
from .cases import MANY, Case, module_of, require
from .memo import tensors_of


def check_untouched(method: Method, case: Case) -> None:
    """The layer, its statistics and the global generator are as before, bit for bit."""
    results = [(option, module_of(new)) for option, new in case.built(method)]
    changed = case.changed(method)
    require(not changed, f"{case.name}: the method changed {', '.join(changed)}")
    given = tensors_of(case.module, case.stats).values()
    memory = {tensor.untyped_storage().data_ptr() for tensor in given}
    for option, new in results:
        for name, tensor in new.state_dict().items():
            shared = tensor.untyped_storage().data_ptr() in memory
            require(not shared, f"{case.at(option)}: {name} lies on the memory of what was given")


def check_deterministic(method: Method, case: Case) -> None:
    """Two runs agree bit for bit, whatever the state of the global generator."""
    first = (case.curve(method).options, list(case.built(method, MANY)))
    again = copy.deepcopy(case.fresh())
    with elsewhere():
        second = (again.curve(method).options, list(again.built(method, MANY)))
    require(first[0] == second[0], f"{case.name}: two curves differ")
    for (option, one), (_, other) in zip(first[1], second[1], strict=True):
        there = module_of(other).state_dict()
        for name, tensor in module_of(one).state_dict().items():
            same = torch.equal(tensor, there[name])
            require(same, f"{case.at(option)}: {name} differs between two runs")


@contextmanager
def elsewhere() -> Iterator[None]:
    """The global generator in another state than that of any run before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() + 1)
        yield
