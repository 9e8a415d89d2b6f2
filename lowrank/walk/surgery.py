"""The one place that replaces modules: in place, in a twin, temporarily, under wrappers.

Modules are identified by object and addressed by their names in the unwrapped model: the wrappers
of torch.compile, DDP, FSDP and activation checkpointing are not part of a name.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.overrides import TorchFunctionMode

from ..errors import LowrankError
from ..linalg.mapped import kept
from ..nn import (
    Form,
    LowRankEmbedding,
    RoutedMLP,
    TiedEmbedding,
    TiedHead,
    is_factored,
    remember_layout,
)
from ..nn.splits import SPLITS
from ..types import Site
from . import layouts

# Names of the module inside a wrapper: torch.compile; FSDP and activation checkpointing.
COMPILED = "_orig_mod"
_WRAPPED = frozenset({COMPILED, "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
REGISTRIES = frozenset({"_modules", "_parameters", "_buffers"})
PARALLEL = (DataParallel, DistributedDataParallel)


def modules_of(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module under each of its names, except those inside factored modules.

    A wrapper comes before the module inside it, under the same name.
    """
    yield prefix, model
    if is_factored(model):
        return
    for key, child in model._modules.items():
        if child is not None:
            yield from modules_of(child, _name(model, key, prefix))


def factored(model: nn.Module) -> dict[str, Form]:
    """The factored modules of a model, under each of their names."""
    return {
        name: module
        for name, module in modules_of(model)
        if isinstance(module, Form) and is_factored(module)
    }


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DDP, DataParallel and torch.compile; not FSDP, which owns the tensors."""
    if isinstance(model, PARALLEL):
        return unwrapped(model.module)
    inner = model._modules.get(COMPILED)
    return model if inner is None else unwrapped(inner)


def module_at(model: nn.Module, name: str) -> nn.Module:
    """The module of that name, inside any wrappers.

    Raises:
        LowrankError: there is none.
    """
    module = _inside(model)
    for key in name.split(".") if name else ():
        child = module._modules.get(key)
        if child is None:
            raise LowrankError(f"{type(_inside(model)).__name__} has no module {name!r}")
        module = _inside(child)
    return module


def plain_name(name: str) -> str:
    """A tensor's name without torch.compile's part; other wrappers remove theirs themselves."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def swap(model: nn.Module, new: Mapping[int, nn.Module]) -> nn.Module:
    """Put `new[id(module)]` at every occurrence of that module; returns the model or new root."""
    if id(model) in new:
        _follow(new[id(model)], model)
        return new[id(model)]
    for parent, key, child in _places(model, new):
        _follow(new[id(child)], child)
        _set(parent, key, new[id(child)])
    return model


def put(model: nn.Module, site: Site, new: nn.Module) -> nn.Module:
    """Put `new` at every occurrence of the site; returns the model, or `new` if it is the root.

    The training flag and `requires_grad` of the replaced layer are kept. If several modules hold a
    table, the first is replaced by `new`, the others by modules tied to it.

    Args:
        site: of this model, or of the model that it is a copy or twin of.
    """
    modules = in_copy(site, model).modules
    first = modules[0]
    adopt(new, first)
    remember_layout(new, layouts.layout(first))
    return swap(model, {id(module): _reader(module, first, new) for module in modules})


def adopt(new: nn.Module, dense: nn.Module) -> nn.Module:
    """Give a factored module the training flag and `requires_grad` of the layer it replaces."""
    new.train(dense.training)
    if isinstance(new, RoutedMLP):
        new.remember(dense)
        return new.requires_grad_(any(p.requires_grad for p in dense.parameters()))
    bias, trained = layouts.bias(dense), _is_trained(dense)
    trained_bias = trained if bias is None else bias.requires_grad
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(trained_bias if name.endswith("bias") else trained)
    return new


def own_memory(layers: Iterable[nn.Module]) -> None:
    """Let dense layers that are views of a larger tensor hold no more memory than they need."""
    for layer in layers:
        if not isinstance(layer, Form):
            for part in filter(_is_view, layer.parameters(recurse=False)):
                part.data = kept(part.detach().clone(memory_format=torch.contiguous_format))


def _is_view(tensor: Tensor) -> bool:
    return not tensor.is_meta and tensor.untyped_storage().nbytes() > tensor.nbytes


def _follow(new: nn.Module, old: nn.Module) -> None:
    """Give `new` the hook that places `old`, whose place it takes, if there is one."""
    hook = getattr(old, "_hf_hook", None)
    if hook is not None and not hasattr(new, "_hf_hook"):
        sys.modules[layouts.HOOKS].add_hook_to_module(new, hook)


def _is_trained(layer: nn.Module) -> bool:
    """Whether the weight is trained; for a factored layer, whether any factor is."""
    if isinstance(layer, Form):
        named = layer.named_parameters()
        return any(p.requires_grad for name, p in named if not name.endswith("bias"))
    return layouts.matrix(layer).requires_grad


def in_copy(site: Site, model: nn.Module) -> Site:
    """The same site in the model that it was found in, or in a copy of it."""
    distinct = {id(module): module for module in (module_at(model, n) for n in site.names)}
    return dataclasses.replace(site, modules=tuple(distinct.values()))


def twin(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares every parameter and buffer, so it costs no memory.

    Replacing modules in one of the two does not affect the other. Attributes that cannot be copied,
    such as a lock or a running iterator, are shared too.
    """
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    try:
        return copied(model, dict(shared))
    except LowrankError:
        return copied(model, _uncopied(model, shared))


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy. Activations that modules keep as attributes lose their graph, with which torch
    refuses to copy them.

    Args:
        memo: as for `copy.deepcopy`; objects to share, by their ids.

    Raises:
        LowrankError: an attribute cannot be copied.
    """
    with _WithoutGraph():
        try:
            return copy.deepcopy(model, memo)
        except Exception as error:  # of attributes of any kind
            raise LowrankError(
                f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}): "
                "remove that attribute first, or work on the model itself (copy=False)"
            ) from error


def _uncopied(model: nn.Module, shared: Mapping[int, Any]) -> dict[int, Any]:
    """What is to be shared, with the modules' attributes that cannot be copied."""
    found = dict(shared)
    for module in reversed(list(model.modules())):  # inner ones first, for those that hold them
        for name, value in vars(module).items():
            if name in REGISTRIES:
                continue
            try:
                with _WithoutGraph():
                    copy.deepcopy(value, dict(found))
            except Exception:  # of any kind
                found[id(value)] = value
    return found


class _WithoutGraph(TorchFunctionMode):
    """A context in which tensors are copied without their graph, wherever they are held."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not Tensor.__deepcopy__ or args[0].is_leaf:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.detach().clone()
        return memo[id(tensor)]


@contextmanager
def replaced(model: nn.Module, site: Site, new: nn.Module) -> Iterator[nn.Module]:
    """A context in which `new` is at every occurrence of the site; undone exactly on exit."""
    if any(module is model for module in site.modules):
        yield new
        return
    readers = {id(module): _reader(module, site.module, new) for module in site.modules}
    places = _places(model, readers)
    try:
        for parent, key, child in places:
            _follow(readers[id(child)], child)
            _set(parent, key, readers[id(child)])
        yield model
    finally:
        for parent, key, child in places:
            _set(parent, key, child)


class StandIn(nn.Module):
    """Calls a layer in its place, and counts; all other attributes are the layer's, but not the
    class."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.calls = 0
        self.training = layer.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__["_modules"]
        return own[name] if name in own else getattr(own["layer"], name)


class StandIns:
    """Stand-ins for the modules of sites.

    A layer that is the model itself has none: whoever calls it holds it.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self.groups = {
            site.name: [StandIn(module) for module in site.modules]
            for site in sites
            if all(module is not model for module in site.modules)
        }
        self.each = [one for group in self.groups.values() for one in group]

    def suffice(self, calls: Mapping[str, int]) -> bool:
        """Whether they were called as often as the layers behind them."""
        counted = ((calls.get(name, 0), group) for name, group in self.groups.items())
        return all(sum(one.calls for one in group) >= count for count, group in counted)


@contextmanager
def stood_in(model: nn.Module, sites: Sequence[Site]) -> Iterator[StandIns]:
    """A context in which stand-ins are in the places of the sites."""
    placed = StandIns(model, sites)
    try:
        swap(model, {id(one.layer): one for one in placed.each})
        yield placed
    finally:
        swap(model, {id(one): one.layer for one in placed.each})


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """A context that restores every module's children and tensors if its body raises, and what
    was split in it."""
    whole = [(m, type(m), dict(vars(m))) for m in model.modules() if type(m) in SPLITS]
    saved = [
        (live, dict(live))
        for module in model.modules()
        for live in (module._modules, module._parameters, module._buffers)
    ]
    try:
        yield
    except BaseException:
        for module, cls, attributes in whole:
            module.__class__ = cls
            vars(module).update(attributes)
        for live, content in saved:
            live.clear()
            live.update(content)  # type: ignore[arg-type]  # of the same dict
        for module in model.modules():
            if COMPILED in module._modules:
                _renew(module)
        raise


def _places(
    model: nn.Module, wanted: Mapping[int, object]
) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, key, child) of every occurrence of these modules."""
    return [
        (parent, key, child)
        for parent in model.modules()
        for key, child in parent._modules.items()
        if child is not None and id(child) in wanted
    ]


def _set(parent: nn.Module, key: str, child: nn.Module) -> None:
    parent._modules[key] = child
    if key == COMPILED:
        _renew(parent)


def _renew(compiled: nn.Module) -> None:
    """Refresh a wrapper of torch.compile, which caches the forward of the module inside."""
    compiled.__setstate__(dict(compiled.__dict__))


def _reader(module: nn.Module, first: nn.Module, new: nn.Module) -> nn.Module:
    """The replacement of `module` when `new` replaces `first`."""
    if module is first or not isinstance(new, LowRankEmbedding):
        return new
    if layouts.kind(module) == "embedding":
        return TiedEmbedding.of(new).train(module.training)
    bias = module._parameters.get("bias")
    return TiedHead.of(new, bias).train(module.training)


def _name(parent: nn.Module, key: str, prefix: str) -> str:
    if _is_inside(parent, key):
        return prefix
    return f"{prefix}.{key}" if prefix else key


def _is_inside(parent: nn.Module, key: str) -> bool:
    """Whether `parent` is a wrapper of this child."""
    return key in _WRAPPED or (isinstance(parent, PARALLEL) and key == "module")


def _inside(module: nn.Module) -> nn.Module:
    """The module inside all wrappers; without a wrapper, the module itself."""
    inner = (child for key, child in module._modules.items() if _is_inside(module, key))
    child = next(inner, None)
    return module if child is None else _inside(child)
