"""Laws about side effects: a method reads, and two runs agree."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..types import Method
from .cases import Case, module_of, require


def check_untouched(method: Method, case: Case) -> None:
    """The layer, its statistics and the global generator are as before, bit for bit."""
    before = snapshot(case)
    results = [module_of(new) for _, new in case.built(method)]
    after = snapshot(case)
    changed = [what for what in {**before, **after} if before.get(what) != after.get(what)]
    require(not changed, f"{case.name}: the method changed {changed}")
    memory = {tensor.untyped_storage().data_ptr() for tensor in _tensors(case).values()}
    for new in results:
        for name, tensor in new.state_dict().items():
            shared = tensor.untyped_storage().data_ptr() in memory
            require(not shared, f"{case.name}: {name} lies on the memory of what was given")


def check_deterministic(method: Method, case: Case) -> None:
    """Two runs agree bit for bit, whatever the state of the global generator."""
    runs = []
    for seed in (1, 2):
        again = copy.deepcopy(case)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            built = [(option, module_of(new)) for option, new in again.built(method)]
            runs.append((again.curve(method).options, built))
    (options, first), (others, second) = runs
    require(options == others, f"{case.name}: two curves differ")
    for (option, one), (_, other) in zip(first, second, strict=True):
        there = other.state_dict()
        for name, tensor in one.state_dict().items():
            same = torch.equal(tensor, there[name])
            require(same, f"{case.at(option)}: {name} differs between two runs")


def _tensors(case: Case) -> dict[str, Tensor]:
    """All tensors that a method is given, by name."""
    named = {**case.module.state_dict(keep_vars=True), **vars(case.stats)}
    return {name: tensor for name, tensor in named.items() if isinstance(tensor, Tensor)}


def snapshot(case: Case) -> dict[str, Any]:
    """All that a method could change, as comparable values."""
    state: dict[str, Any] = {"the global generator": torch.get_rng_state().tolist()}
    for name, module in case.module.named_modules():
        held = vars(module).items()
        plain = {key: value for key, value in held if not isinstance(value, dict)}
        inner = {key: list(value) for key, value in held if isinstance(value, dict)}
        state[f"the module {name!r}"] = (id(module), plain, inner)  # flags, hooks, names
    for name, tensor in _tensors(case).items():
        data = tensor.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes()
        place = (id(tensor), tensor.data_ptr(), tensor._version)
        state[name] = (*place, tensor.requires_grad, tensor.grad is None, data)
    return state
