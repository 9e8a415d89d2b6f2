"""What one forward pass shows: which layers read one tensor, and which modules form a chain.

No architecture is assumed. Layers that receive the same tensor form a group; members of an ordered
container that take the previous member's output form a chain of blocks. Where something comes in
between, such as a residual sum, each member is a chain of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowrankError
from ..types import Site, Statistics
from ..walk import layouts
from ..walk.surgery import stood_in
from .cuts import Cuts
from .padding import Padding
from .processes import gathered, summed
from .running import (
    Run,
    SameTensor,
    Unpadded,
    first_tensor,
    input_of,
    quiet,
    takes_hooks,
    tensors_in,
)
from .stand_ins import bypassed, irreplaceable


@dataclass(frozen=True)
class Observation:
    """Order of calls, groups and chains in one forward pass.

    Attributes:
        order: names of the sites in the order of their first call; those never called are absent.
        groups: sites that read the same tensor at every call, in call order; singles included.
        chains: per chain of blocks, the names of its members in order; chains in order of calls.
        shapes: shape of each site's input at its first call.
        bypassed: sites that are never called, while their weights are read.
        irreplaceable: sites in whose place the model would not call another module.
        calls: how often each site was called.
        cuts: of linear layers, the sizes of the parts into which the model cuts what they return.
    """

    order: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    chains: tuple[tuple[str, ...], ...]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    bypassed: tuple[str, ...] = ()
    calls: dict[str, int] = field(default_factory=dict)
    cuts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    irreplaceable: tuple[str, ...] = ()


def observe(model: nn.Module, sites: Sequence[Site], run: Run) -> Observation:
    """Run the model once under hooks; the model and its modes are restored.

    Stand-ins are in the places of the layers. Where they change something the model is run again:
    without them, and with some, to find out which.
    """
    with stood_in(model, sites) as stand_ins:
        try:
            seen = _observed(model, sites, run)
        except Exception:  # the run below raises it again, if it is the model's own
            seen = None
    if seen is not None and stand_ins.suffice(seen.calls):
        unseen = [site for site in sites if site.name not in seen.shapes]
        if not unseen:
            return seen
        passed, called = bypassed(model, unseen, run)
        if not called:
            return replace(seen, bypassed=passed)
    seen = _observed(model, sites, run)
    unseen = [site for site in sites if site.name not in seen.shapes]
    return replace(
        seen,
        bypassed=bypassed(model, unseen, run)[0] if unseen else (),
        irreplaceable=irreplaceable(model, sites, seen.calls, run),
    )


def _observed(model: nn.Module, sites: Sequence[Site], run: Run) -> Observation:
    """What one run shows of the sites that are called in it."""
    reads, cuts = _Reads(), Cuts()
    containers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and all(map(takes_hooks, module))
    }
    chains = {name: _Chain(len(module)) for name, module in containers.items()}
    handles = []
    try:
        for site in sites:
            handles += [
                module.register_forward_pre_hook(_noted(reads, site), with_kwargs=True)
                for module in site.modules
                if site.kind != "embedding"  # ids are not multiplied
            ]
            if site.kind == "linear":
                handles += cuts.hooks(site)
        for name, container in containers.items():
            for index, member in enumerate(container):
                handles += chains[name].hooks(index, member)
        with quiet(model), cuts:
            run()
    finally:
        for handle in handles:
            handle.remove()
    members = {
        name: tuple(f"{name}.{index}".lstrip(".") for index in container._modules)
        for name, container in containers.items()
    }
    layers = [site.name for site in sites]
    linked = _outermost({n: members[n] for n, chain in chains.items() if chain.linked()}, layers)
    single = [members[name][index] for name, chain in chains.items() for index in chain.once()]
    return Observation(
        order=tuple(reads.shapes),
        groups=reads.groups(),
        chains=_in_order(_with_singles(linked, single, layers), tuple(reads.shapes)),
        shapes=reads.shapes,
        calls=reads.counts(),
        cuts=cuts.sizes(),
    )


def _outermost(
    chains: Mapping[str, tuple[str, ...]], layers: Sequence[str]
) -> tuple[tuple[str, ...], ...]:
    """The chains that lie in no other.

    One that has three quarters of its layers in a single member, which holds a chain itself, is
    passed over: an encoder and its pooling, or a backbone and its head.

    Args:
        chains: names of the members, by the name of the container, outer ones first.
        layers: names of all sites.
    """
    chosen: list[str] = []
    for name, members in chains.items():
        if any(inside(name, outer) for outer in chosen):
            continue
        held = {m: sum(inside(layer, m) for layer in layers) for m in members}
        largest = max(members, key=held.__getitem__)
        divided = any(inside(inner, largest) for inner in chains)
        if not (divided and 4 * held[largest] >= 3 * sum(held.values())):
            chosen.append(name)
    return tuple(chains[name] for name in chosen)


def _with_singles(
    chains: Sequence[tuple[str, ...]], members: Sequence[str], layers: Sequence[str]
) -> list[tuple[str, ...]]:
    """The chains, and every outermost member of the other containers as a chain of one block.

    Such a member holds several layers, but no chain of blocks with several, and less than three
    quarters of all layers, since all of it is run for each of its layers. Chains of single layers
    inside of it are dropped.

    Args:
        members: names of those that are called once, outer ones first.
        layers: names of all sites.
    """

    def held(name: str) -> int:
        return sum(inside(layer, name) for layer in layers)

    thick = [chain for chain in chains if max(map(held, chain)) > 1]
    blocks = {block for chain in thick for block in chain}
    single: list[str] = []
    for name in members:
        taken = any(inside(name, outer) for outer in (*blocks, *single))
        divided = any(inside(block, name) for block in blocks)
        if not taken and not divided and held(name) > 1 and 4 * held(name) < 3 * len(layers):
            single.append(name)
    kept = [c for c in chains if c in thick or not any(inside(c[0], name) for name in single)]
    return [*kept, *((name,) for name in single)]


def _in_order(
    chains: Sequence[tuple[str, ...]], order: Sequence[str]
) -> tuple[tuple[str, ...], ...]:
    """The chains by their first call of a layer."""

    def first(chain: tuple[str, ...]) -> int:
        calls = (i for i, name in enumerate(order) for b in chain if inside(name, b))
        return next(calls, len(order))

    return tuple(sorted(chains, key=first))


def _noted(reads: _Reads, site: Site) -> Callable[..., None]:
    """A hook that notes what a site reads.

    Raises:
        LowrankError: numbers of a dtype that the layer cannot multiply; unlike in torch's error,
            the site is named.
    """

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        tensor = input_of(args, kwargs)
        if tensor is not None and not layouts.multiplies(module, tensor):
            raise LowrankError(
                f"{site.title}: its input is {tensor.dtype}, its weight "
                f"{layouts.matrix(module).dtype}: convert the data, or run it under autocast"
            )
        reads.note(site.name, tensor, layouts.reading(module))

    return hook


class _Reads:
    """The read behind each call of a site; a read is one tensor between its first and last use."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._calls: dict[str, list[int]] = {}
        self._how: dict[str, tuple[object, ...]] = {}
        self._recent: list[tuple[SameTensor, int]] = []
        self._count = 0

    def note(self, name: str, tensor: Tensor | None, how: tuple[object, ...] = ()) -> None:
        """`how`: what else determines the rows that are read of the tensor."""
        if tensor is None:
            return
        self._how[name] = how
        self.shapes.setdefault(name, tuple(tensor.shape))
        read = next((n for same, n in reversed(self._recent) if same(tensor)), None)
        if read is None:
            self._count += 1
            read = self._count
            self._recent = [*self._recent[-15:], (SameTensor(tensor), read)]
        self._calls.setdefault(name, []).append(read)

    def counts(self) -> dict[str, int]:
        return {name: len(reads) for name, reads in self._calls.items()}

    def groups(self) -> tuple[tuple[str, ...], ...]:
        readers: dict[tuple[object, ...], list[str]] = {}
        for name, reads in self._calls.items():
            readers.setdefault((*reads, self._how[name]), []).append(name)
        return tuple(tuple(names) for names in readers.values())


class _Chain:
    """Whether each member of a container received the previous member's output, and its calls."""

    def __init__(self, length: int) -> None:
        self._outputs: list[list[SameTensor]] = [[] for _ in range(length)]
        self._links = [False] * length
        self._calls = [0] * length
        self._maps = [False] * length  # numbers to numbers

    def hooks(self, index: int, member: nn.Module) -> list[Any]:
        def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self._calls[index] += 1
            given = list(tensors_in((args, kwargs)))
            self._maps[index] = any(t.is_floating_point() for t in given)
            # A member that occurs several times is called several times: one link is enough.
            if index > 0 and not self._links[index]:
                self._links[index] = any(
                    same(tensor) for same in self._outputs[index - 1] for tensor in given
                )

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            self._outputs[index] = [SameTensor(tensor) for tensor in tensors_in(output)]
            first = first_tensor(output)
            self._maps[index] &= first is not None and first.is_floating_point()

        return [
            member.register_forward_pre_hook(before, with_kwargs=True),
            member.register_forward_hook(after),
        ]

    def linked(self) -> bool:
        return len(self._calls) > 1 and all(self._calls) and all(self._links[1:])

    def once(self) -> list[int]:
        """The members that are called once, with numbers, and return numbers."""
        return [i for i, calls in enumerate(self._calls) if calls == 1 and self._maps[i]]


def inside(name: str, outer: str) -> bool:
    """Whether a module of this name is `outer` or lies in it."""
    return outer in ("", name) or name.startswith(f"{outer}.")


class Frequencies:
    """Hooks that count the ids looked up; padded positions are left out."""

    def __init__(self, sites: Sequence[Site], padding: Padding | Unpadded) -> None:
        self._counts = {site.name: torch.zeros(0) for site in sites}
        self._sites = sites
        self._padding = padding
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for site in self._sites:
            for module in site.modules:
                if layouts.kind(module) == "embedding":
                    hook = self._hook(site)
                    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                    self._handles.append(handle)

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def statistics(self, name: str, head: Statistics | None) -> Statistics:
        """The statistics of one table; `head` are those of the input of the tied output head."""
        counts = self._counts[name]
        if not counts.numel():
            return Statistics()
        statistics = Statistics(count=int(counts.sum()), freq=counts)
        return statistics if head is None else replace(statistics, gram=head.gram, mean=head.mean)

    def add_up(self) -> None:
        """Add the counts of the other processes."""
        own = {name for name, counts in self._counts.items() if counts.numel()}
        read = set().union(*gathered(own))
        for site in self._sites:
            if site.name in read and site.name not in own:
                table = layouts.matrix(site.module)
                zero = torch.zeros(site.shape[0], dtype=torch.float64, device=table.device)
                self._counts[site.name] = zero
            if site.name in read:
                summed(self._counts[site.name])

    def _hook(self, site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            ids = first_tensor((args, kwargs))
            if ids is not None:
                self._add(site, module, ids.detach())

        return hook

    @torch.inference_mode(False)  # counts outlive the caller's inference mode
    def _add(self, site: Site, module: nn.Module, ids: Tensor) -> None:
        """Count ids of any shape.

        Raises:
            LowrankError: an id is out of range; the site is named, unlike in torch's error.
        """
        if ids.is_floating_point():
            return  # the layer itself raises a better error
        rows = site.shape[0]
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
            raise LowrankError(
                f"{site.title}: ids must be in [0, {rows}), the data holds "
                f"{int(ids.min())} to {int(ids.max())}"
            )
        real = self._padding.real(site.name, module, ids)
        if real is not None:
            ids = ids[real.to(ids.device)]
        counts = torch.bincount(ids.flatten().long(), minlength=rows).double()
        if isinstance(module.padding_idx, int):
            counts[module.padding_idx] = 0  # padding is not a token
        previous = self._counts[site.name]
        self._counts[site.name] = counts if not previous.numel() else previous + counts.to(previous)
