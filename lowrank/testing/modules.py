"""Laws about the factored module: its cost, its forward pass, its tensors, how it is rebuilt."""

from __future__ import annotations

import copy
import json

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..nn import LowRankLinear
from ..types import Factored, Method, Nested
from ..walk import layouts
from .cases import MANY, Case, module_of, require


def check_cost(method: Method, case: Case) -> None:
    """An option costs what its module stores and what a file of it holds, biases excluded."""
    for option, new in case.built(method):
        state = module_of(new).state_dict()
        biases = {name for name in state if name.rpartition(".")[2] == "bias"}
        weights = [tensor for name, tensor in state.items() if name not in biases]
        params = sum(tensor.numel() for tensor in weights if tensor.is_floating_point())
        stored = sum(_bytes(tensor) for tensor in weights)
        saved = file_bytes(state) - sum(_bytes(state[name]) for name in biases)
        where, cost = case.at(option), option.cost
        require(cost.params == params, f"{where}: {params} params are stored, it costs {cost}")
        require(cost.bytes == stored, f"{where}: {stored} bytes are stored, it costs {cost}")
        require(cost.bytes == saved, f"{where}: {saved} bytes are saved, it costs {cost}")
        require(new.cost() == cost, f"{where}: the module says {new.cost()}, the option {cost}")


def check_macs(method: Method, case: Case) -> None:
    """An option costs the products that PyTorch counts for one token, or one output position."""
    for option, new in case.built(method):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            output = module_of(new)(case.inputs[:1])
        counted = counter.get_total_flops() // 2 // case.positions(output)
        text = f"{case.at(option)}: {counted} products are computed, it costs {option.cost}"
        require(counted == option.cost.macs, text)


def check_nested(method: Method, case: Case) -> None:
    """Where a method says so, its plain factors of a rank are the leading ones of the largest."""
    if not (isinstance(method, Nested) and method.nested):
        return
    built = [(o, new) for o, new in case.built(method, MANY) if isinstance(new, LowRankLinear)]
    for option, new in built:
        largest, weight = built[-1][1], new.dense_weight(torch.float64)
        down, up = largest.down.weight[: new.rank], largest.up.weight[:, : new.rank]
        product = (up.double() @ down.double()).detach()
        size = weight.detach().norm().clamp(min=1e-30)
        error = float((product - weight.detach()).norm() / size)
        text = f"{case.at(option)}: the leading factors of a larger rank differ by {error:.3g}"
        require(error <= case.rounding, text)


def check_forward(method: Method, case: Case) -> None:
    """module(x) is F.linear(x, dense_weight(), bias), with the bias of the layer it replaces; of
    an embedding, the rows of dense_weight()."""
    x = case.batch()
    for option, new in case.built(method):
        module, where = module_of(new), case.at(option)
        with torch.no_grad():
            weight = new.dense_weight()
            require(weight.shape == case.site.shape, f"{where}: it stands for {weight.shape}")
            got, want = module(x), case.outputs(weight, x)
            silent, offset = module(x * 0), case.outputs(weight, x * 0)
        require(got.shape == want.shape, f"{where}: output of shape {tuple(got.shape)}")
        scale = weight.double().norm() + offset.double().abs().max()
        if x.is_floating_point():  # ids have no zero that gives the bias alone
            same = torch.equal(silent, offset)
            require(same, f"{where}: the bias is not that of the dense layer")
            far = x.double().flatten(1) if case.site.kind == "conv" else x.double()
            scale = scale + weight.double().norm() * far.norm(dim=-1).max()
        error = float((got.double() - want.double()).abs().max() / scale.clamp(min=1e-30))
        text = f"{where}: output differs from F.linear(x, dense_weight(), bias) by {error:.3g}"
        require(error <= case.rounding, text)


def check_dtype(method: Method, case: Case) -> None:
    """Factors and outputs have the dtype and the device of the layer, and are finite."""
    weight = layouts.matrix(case.module)
    for option, new in case.built(method):
        for name, tensor in module_of(new).state_dict().items():
            check_like(weight, tensor, f"{case.at(option)}: {name}")
        with torch.no_grad():
            check_like(weight, module_of(new)(case.inputs), f"{case.at(option)}: the output")


def check_rebuilt(method: Method, case: Case) -> None:
    """`empty(**spec)` and the stored tensors give the same module, through safetensors too."""
    from safetensors.torch import load, save

    for option, new in case.built(method, MANY):
        where, state = case.at(option), module_of(new).state_dict()
        check_owned(state, where)
        with torch.no_grad():
            want = module_of(new)(case.inputs)
        read = load(save({name: tensor.cpu() for name, tensor in state.items()}))
        read = {name: tensor.to(want.device) for name, tensor in read.items()}
        for how, tensors in (("its state_dict", state), ("safetensors", read)):
            module = module_of(empty_like(new))
            filled = [name for name, tensor in module.state_dict().items() if not tensor.is_meta]
            require(not filled, f"{where}: empty() gave memory to {filled}")
            try:
                module.load_state_dict(tensors, assign=True)
            except RuntimeError as error:
                raise AssertionError(f"{where}: empty(**spec) is another module: {error}") from None
            with torch.no_grad():
                same = torch.equal(module(case.inputs), want)
            require(same, f"{where}: rebuilt from {how} it gives other outputs")


def check_gradients(method: Method, case: Case) -> None:
    """Gradients reach every factor: two steps of descent move them all."""
    x, dense = case.inputs, case.module
    x = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        shape = dense(case.inputs).shape
    target = torch.arange(shape.numel()).double().cos().reshape(shape).to(x.device)
    for option, new in case.built(method, MANY):
        module = copy.deepcopy(module_of(new)).double()
        for _ in range(2):  # of a zero weight, one factor moves first and so wakes the other
            module.zero_grad()
            (module(x) - target).square().mean().backward()
            for name, parameter in module.named_parameters():
                reached = parameter.grad is not None and torch.isfinite(parameter.grad).all()
                require(bool(reached), f"{case.at(option)}: no finite gradient at {name}")
                parameter.data -= 0.1 * parameter.grad  # type: ignore[operator]
        after = dict(module.named_parameters())
        before = module_of(new).named_parameters()
        still = [name for name, value in before if torch.equal(value.double(), after[name])]
        require(not still, f"{case.at(option)}: no gradient reached {still}")


def check_like(weight: Tensor, tensor: Tensor, what: str) -> None:
    same = tensor.dtype == weight.dtype or not tensor.is_floating_point()
    text = f"{what} is {tensor.dtype} on {tensor.device}, the layer {weight.dtype}"
    require(same and tensor.device == weight.device, f"{text} on {weight.device}")
    require(bool(torch.isfinite(tensor).all()), f"{what} holds NaN or Inf")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def file_bytes(state: dict[str, Tensor]) -> int:
    """Of the tensors in a safetensors file: what follows its header."""
    from safetensors.torch import save

    body = save({name: tensor.cpu() for name, tensor in state.items()})
    return len(body) - 8 - int.from_bytes(body[:8], "little")


def check_owned(state: dict[str, Tensor], where: str) -> None:
    """Every tensor is contiguous and alone on its storage, or safetensors refuses it."""
    memory: set[int] = set()
    for name, tensor in state.items():
        storage = tensor.untyped_storage()
        alone = storage.nbytes() == _bytes(tensor) and storage.data_ptr() not in memory
        own = alone and tensor.is_contiguous()
        require(own, f"{where}: {name} is not contiguous on storage of its own")
        memory.add(storage.data_ptr())


def empty_like(new: Factored) -> Factored:
    """Rebuilt from the JSON of its spec."""
    return type(new).empty(**json.loads(json.dumps(new.spec())))
