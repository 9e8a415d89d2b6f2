"""Laws of joint methods: several layers that read one input, factored with something in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, product

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..types import Curve, Factored, JointMethod
from ..walk import layouts
from .cases import DTYPES, MANY, factored_options, module_of, numbers, require
from .crossing import check_laws
from .error_laws import error_of
from .joint_cases import JOINT_CASES, JointCase
from .modules import check_like, check_owned, empty_like, file_bytes
from .purity import elsewhere


def check_curve(method: JointMethod, case: JointCase) -> None:
    """It covers all names; cost rises and error falls, from `total` to the dense weights' zero."""
    curve = case.curve(method)
    names = tuple(name for site in case.sites for name in site.names)
    require(curve.sites == names, f"{case.name}: the curve is of {curve.sites}, not of {names}")
    factored, last = factored_options(curve, case.name), curve.options[-1]
    dense = [sum(site.cost.of(unit) for site in case.sites) for unit in ("params", "bytes")]
    same = [last.cost.params, last.cost.bytes] == dense and last.dense and last.error == 0
    require(same, f"{case.name}: the last option is not the dense weights with error 0: {last}")
    total = sum(error_of(curve, numbers(layouts.matrix(c.module)), c) for c in case.members)
    text = f"{case.name}: total is {curve.total}, the zero matrices' error {total}"
    require(abs(curve.total - total) <= 1e-9 * total, text)
    errors = [curve.total * (1 + 1e-12), *(option.error for option in factored)]
    falling = all(before > after >= 0 for before, after in pairwise(errors))
    require(falling or total == 0, f"{case.name}: errors do not fall: {errors}")
    costs = [option.cost.params for option in curve.options]
    rising = all(before < after for before, after in pairwise([0, *costs]))
    require(rising, f"{case.name}: costs do not rise: {costs}")


def check_exact(method: JointMethod, case: JointCase) -> None:
    """Where the curve says `exact`, the stored factors show the error that it predicts."""
    curve = case.curve(method)
    for option, new in case.built(method) if curve.exact else ():
        measured = _measured(curve, case, new)
        allowed = (1e-6 + case.rounding) * curve.total
        text = f"{case.name}, size {option.size}: predicted {option.error}, measured {measured}"
        require(abs(measured - option.error) <= allowed, text)


def check_planted(method: JointMethod, case: JointCase) -> None:
    """Weights that do have a common input basis of two rows are reproduced at rank 2."""
    rng = torch.Generator().manual_seed(40)
    columns = case.sites[0].shape[1]
    basis = torch.randn(2, columns, generator=rng, dtype=torch.float64)
    members = []
    for member in case.members:
        module = copy.deepcopy(member.module)
        up = torch.randn(member.site.shape[0], 2, generator=rng, dtype=torch.float64)
        with torch.no_grad():
            layouts.matrix(module).copy_(up @ basis)
        members.append(replace(member, site=replace(member.site, modules=(module,))))
    case = JointCase(tuple(members))
    curve = case.curve(method)
    option = next((option for option in curve.options if option.size == (2,)), None)
    if option is None:
        raise AssertionError(f"{case.name}: the curve lacks the planted size (2,)")
    new = case.factored(method, option)
    missed = (_measured(curve, case, new) / curve.total) ** 0.5
    text = f"{case.name}: the planted weights are missed by {missed:.3g}"
    require(missed <= 1e-9 + case.rounding, text)


def check_cost(method: JointMethod, case: JointCase) -> None:
    """An option costs what all modules store together, in memory and in a file, without biases."""
    for option, new in case.built(method):
        where, state = f"{case.name}, size {option.size}", _state(new)
        check_owned(state, where)
        weights = [tensor for name, tensor in state.items() if not name.endswith("bias")]
        biases = [tensor for name, tensor in state.items() if name.endswith("bias")]
        stored = (sum(t.numel() for t in weights), _bytes(weights))
        saved = file_bytes(state) - _bytes(biases)
        own = sum(each.cost().params for each in new), sum(each.cost().bytes for each in new)
        cost = (option.cost.params, option.cost.bytes)
        text = f"{where}: it costs {cost}; stored {stored}, saved {saved}, by its modules {own}"
        require(cost == stored == own and saved == cost[1], text)


def check_macs(method: JointMethod, case: JointCase) -> None:
    """It costs the products that PyTorch counts when all members read one token: what they share
    is computed once."""
    for option, new in case.built(method):
        x = case.inputs[:1].clone()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            for each in new:
                module_of(each)(x)
        counted, own = counter.get_total_flops() // 2, sum(each.cost().macs for each in new)
        text = f"{case.name}, size {option.size}: {counted} products are computed, by the modules "
        require(counted == option.cost.macs == own, f"{text}{own}, the option {option.cost.macs}")


def check_forward(method: JointMethod, case: JointCase) -> None:
    """Each member is F.linear(x, dense_weight(), its bias), in the layer's dtype."""
    x = case.inputs[:4].reshape(2, 2, -1).clone()
    for option, new in case.built(method):
        for member, each in zip(case.members, new, strict=True):
            where = f"{member.site.name} of {case.name}, size {option.size}"
            with torch.no_grad():
                weight, got = each.dense_weight(), module_of(each)(x)
                want = member.outputs(weight, x)
            require(weight.shape == member.site.shape, f"{where}: it stands for {weight.shape}")
            check_like(layouts.matrix(member.module), got, f"{where}: the output")
            scale = weight.double().norm() * x.double().norm(dim=-1).max() + want.double().norm()
            error = float((got.double() - want.double()).abs().max() / scale.clamp(min=1e-30))
            require(error <= case.rounding, f"{where}: output differs by {error:.3g}")


def check_rebuilt(method: JointMethod, case: JointCase) -> None:
    """Empty modules, bound to the first and loaded from a file, give the same outputs."""
    from safetensors.torch import load, save

    for option, new in case.built(method, MANY):
        state = load(save({name: t.cpu() for name, t in _state(new).items()}))
        again = nn.ModuleList(module_of(empty_like(each)) for each in new)
        filled = [name for name, tensor in again.state_dict().items() if not tensor.is_meta]
        require(not filled, f"{case.name}: empty() gave memory to {filled}")
        for each in again[1:]:
            each.bind(again[0])  # type: ignore[operator]
        placed = {name: tensor.to(case.inputs.device) for name, tensor in state.items()}
        again.load_state_dict(placed, assign=True)
        with torch.no_grad():
            pairs = [(module_of(one), two) for one, two in zip(new, again, strict=True)]
            same = all(torch.equal(one(case.inputs), two(case.inputs)) for one, two in pairs)
        require(same, f"{case.name}, size {option.size}: rebuilt, it gives other outputs")


def check_gradients(method: JointMethod, case: JointCase) -> None:
    """From each member alone, gradients reach its own tensors and those that it shares.

    A weight of zero is left out: others have to wake the basis before it can learn.
    """
    x = case.inputs.double()
    for option, new in case.built(method, MANY):
        modules = nn.ModuleList(module_of(each) for each in new)
        for number in range(len(new)):
            twin = copy.deepcopy(modules).double()
            with torch.no_grad():
                before = [module(x) for module in twin]
            twin[number](x).square().sum().backward()
            with torch.no_grad():
                for parameter in twin.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(0.1 * parameter.grad)
                moved = [not torch.equal(m(x), y) for m, y in zip(twin, before, strict=True)]
            asleep = not bool(new[number].dense_weight().any())
            text = f"{case.name}, size {option.size}: descent of member {number} moves {moved}"
            require(all(moved) or asleep, text)


def check_untouched(method: JointMethod, case: JointCase) -> None:
    """Layers, statistics and the global generator are as before; nothing lies on their memory."""
    states = [_state(new) for _, new in case.built(method)]
    changed = case.changed(method)
    require(not changed, f"{case.name}: the method changed {', '.join(changed)}")
    given = [t for m in case.members for t in (*m.module.parameters(), m.stats.gram, m.stats.mean)]
    memory = {t.untyped_storage().data_ptr() for t in given if t is not None}
    for state in states:
        taken = [n for n, t in state.items() if t.untyped_storage().data_ptr() in memory]
        require(not taken, f"{case.name}: {taken} lie on the memory of what was given")


def check_deterministic(method: JointMethod, case: JointCase) -> None:
    """Two runs agree bit for bit, whatever the state of the global generator."""
    first, again = list(case.built(method, MANY)), copy.deepcopy(case.fresh())
    with elsewhere():
        second = list(again.built(method, MANY))
    for (option, one), (other, two) in zip(first, second, strict=True):
        there = _state(two)
        same = all(torch.equal(tensor, there[name]) for name, tensor in _state(one).items())
        text = f"{case.name}, size {option.size}: two runs differ"
        require(same and option == other, text)


def _measured(curve: Curve, case: JointCase, new: Sequence[Factored]) -> float:
    """Error of all members together, from their inputs."""
    errors = []
    for member, each in zip(case.members, new, strict=True):
        weight, stands_for = layouts.matrix(member.module), each.dense_weight(torch.float64)
        errors.append(error_of(curve, numbers(weight) - numbers(stands_for), member))
    return sum(errors)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _state(new: Sequence[Factored]) -> dict[str, Tensor]:
    """All tensors of a group, as a model that holds it would store them."""
    return dict(nn.ModuleList(module_of(each) for each in new).state_dict())


JOINT_LAWS: Mapping[str, Callable[[JointMethod, JointCase], None]] = {
    "curve": check_curve,
    "exact": check_exact,
    "planted": check_planted,
    "cost": check_cost,
    "macs": check_macs,
    "forward": check_forward,
    "rebuilt": check_rebuilt,
    "gradients": check_gradients,
    "untouched": check_untouched,
    "deterministic": check_deterministic,
}


def check_joint_method(
    method: JointMethod,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    device: torch.device | str = "cpu",
) -> None:
    """Hold a joint method against all laws on all cases.

    Raises:
        AssertionError: on a case, laws are broken; each is named with case, dtype and size.
    """
    for make, dtype in product(JOINT_CASES.values(), dtypes):
        check_laws(method, make(dtype=dtype, device=device), JOINT_LAWS)
