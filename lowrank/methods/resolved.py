"""A request's method, found once: what sites, alone or in groups, are measured and factored by.

Everything that measures or makes layers asks here: plans and their application, the probe, sweeps
and sensitivity. So all of them see the same curve of a site, whatever its kind, its storage and
what the data showed of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import linalg
from ..calibration.statistics import Calibration, statistics_of
from ..errors import LowrankError, listed, unknown
from ..nn import ChannelConv, LowRankLinear
from ..types import (
    Curve,
    Factored,
    HandsOver,
    JointMethod,
    Method,
    Named,
    Option,
    OwnError,
    OwnForm,
    Site,
    Size,
    Statistics,
    WeighsOutputs,
)
from ..walk import layouts
from . import JOINT, METHODS
from .common import pivoted_curve, pivoted_layer
from .conv_forms import FORMS, Metric, fitted
from .svd import SVD

Given = str | Method | JointMethod | None
Group = Sequence[Site]  # sites that read one tensor; a site alone is a group of one
PLAIN = frozenset({"factors", "pivoted"})


@dataclass(frozen=True)
class Resolved:
    """What factors each site.

    Attributes:
        method: of sites alone. It may leave those of some kinds to another method.
        joint: of several sites that read one tensor, or None.
        storage: of linear layers: "factors" or "pivoted".
        called: what the options of these methods call them, as a plan's entries do.
        seed: of methods that other entries name.
    """

    method: Method
    joint: JointMethod | None = None
    storage: str = "factors"
    called: tuple[str, ...] = ()
    seed: int = 0

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that are read."""
        own = frozenset() if self.joint is None else self.joint.needs
        return own | self.method.needs

    def for_kind(self, kind: str) -> Method:
        """The method of sites of this kind that are alone."""
        if isinstance(self.method, HandsOver):
            return self.method.for_kind(kind)
        return self.method

    def takes(self, kind: str) -> bool:
        return kind in self.for_kind(kind).kinds

    def is_seen(self, site: Site, calibration: Calibration | None) -> bool:
        """Whether there are the statistics that the site's method works from."""
        if calibration is None or not self.for_kind(site.kind).needs:
            return True
        least = max(calibration.min_tokens, 1)
        return statistics_of(site, calibration).count >= least

    def curve(
        self, group: Group, calibration: Calibration | None, *, ranked: bool = False
    ) -> Curve:
        """The options of a site, or of a group as one; of one that the data did not reach, those
        of plain SVD (on_missing="data-free").

        Args:
            ranked: a convolution is to have a rank, of channels: no other form stands beside it.
        """
        site, stats = group[0], statistics_of(group[0], calibration)
        if self.joint is not None and len(group) > 1:
            return self.joint.curve(group, stats)
        method = self.for_kind(site.kind)
        if ranked and site.kind == "conv" and "conv" in self.method.kinds:
            method = self.method
        if not self.is_seen(site, calibration):
            method, stats = SVD(), Statistics()
        curve = method.curve(site, stats)
        pivoted = self.storage == "pivoted" and not own_form(method)
        return pivoted_curve(curve, site) if pivoted else curve

    def factor(self, group: Group, option: Option, stats: Statistics) -> list[nn.Module]:
        """The new modules of a site or a group, in its order; nothing is put in place.

        Raises:
            LowrankError: the method is not at hand, lacks statistics, or gave no modules.
        """
        method = self.maker(option.method, group[0], grouped=len(group) > 1)
        if method.needs and stats.count == 0:
            raise LowrankError(
                f"{group[0].title}: {option.method} works from calibration data "
                f"({', '.join(sorted(method.needs))}): pass data=… that reaches this layer"
            )
        modules = [site.module for site in group]
        with torch.no_grad():
            if len(group) > 1:
                made = list(cast(JointMethod, method).factor(modules, option, stats))
            else:
                made = [cast(Method, method).factor(modules[0], option, stats)]
        wrong = [type(new).__name__ for new in made if not isinstance(new, nn.Module)]
        if wrong or len(made) != len(group):
            said = f"an nn.Module, got {listed(wrong)}"
            if not wrong:
                said = f"{len(group)} modules, got {len(made)}"
            raise LowrankError(f"{group[0].title}: {option.method} must give {said}")
        if option.storage == "pivoted":
            made = [pivoted_layer(new, option.method) for new in made]
        return made

    def error(self, site: Site, curve: Curve, new: nn.Module, stats: Statistics) -> float | None:
        """Error of the stored factors, rounding included, in the norm of the site's curve; None
        where the module or the norm cannot be read."""
        if not isinstance(new, Factored):
            return None
        gram = stats.gram if curve.norm == "output" else None
        dense = new.dense_weight(torch.float64)
        method = self.for_kind(site.kind)
        if curve.norm not in ("weight", "output"):
            if not isinstance(method, OwnError):
                return None
            return float(method.error(site.module, dense, stats))
        if curve.norm == "output" and site.kind == "embedding" and stats.freq is not None:
            difference = layouts.matrix(site.module).detach().double() - dense.detach()
            metric = linalg.output_metric(stats.gram, site.shape[1])
            return linalg.token_error(difference, linalg.token_weights(stats.freq), metric)
        if curve.norm == "output" and gram is None:
            return None
        return linalg.squared_error(layouts.matrix(site.module), dense, gram)

    def refitted(
        self,
        site: Site,
        option: Option,
        stats: Statistics,
        *,
        gram: Tensor,
        target: Tensor,
        least: float = 0.0,
        seed: int = 0,
    ) -> Any:
        """The layer of an option made anew, in closed form, for the stream that it really reads.

        Args:
            stats: of the dense stream: what the outputs are weighed by.
            gram, target: H' and K, (in, in); see linalg/refit.py.
        """
        method = cast(Method, self.maker(option.method, site, grouped=False))
        root = method.output_metric(stats) if isinstance(method, WeighsOutputs) else None
        if site.kind == "conv" or option.storage in PLAIN:
            return refitted_layer(
                site.module, option.size or (1,), option.storage, gram, target, root=root,
                least=least, seed=seed,
            )  # fmt: skip
        return refitted_form(method, site.module, option, gram, target, least=least)

    def maker(self, named: str, site: Site, *, grouped: bool) -> Method | JointMethod:
        """What makes the layers of an option or an entry that calls its method so.

        Raises:
            LowrankError: that name is neither one of these methods nor of the registry.
        """
        if grouped and self.joint is not None:
            return self.joint
        own = self.for_kind(site.kind)
        if not grouped and (named in self.called or named in names_of(own)):
            return own
        if not grouped and named in METHODS:
            return dataclasses.replace(self, method=method_of(named, self.seed)).for_kind(site.kind)
        raise LowrankError(
            f"{site.title}: the plan's method {named!r} is none of "
            f"{listed(JOINT if grouped else METHODS)}: pass the object as method=…"
        )

    def knowing(self, curves: Iterable[Curve]) -> Resolved:
        """The same, told by the options of its own curves what they call it."""
        names = dict.fromkeys(self.called)
        for curve in curves:
            names |= dict.fromkeys(o.method for o in curve.options if not o.dense)
        return dataclasses.replace(self, called=tuple(names))

    def name(self) -> str:
        """What plans call the method: by its registered name, or as its options do."""
        method = self.joint or self.method
        names = names_of(method)
        both = [name for name in names if name in self.called]
        return (*both, *names, *self.called, type(method).__name__)[0]


def resolve(given: Given, *, seed: int = 0, storage: str = "factors", data: bool) -> Resolved:
    """What a name or an object stands for; None stands for what the presence of data allows."""
    joint = joint_of(given, seed)
    single = given if joint is None else joint.alone
    method = method_of(cast(Any, single) or ("whitened" if data else "svd"), seed)
    return Resolved(method, joint, storage, seed=seed)


def method_of(given: str | Method, seed: int = 0) -> Method:
    """The method that a name stands for, with the given seed; an object is returned as it is."""
    if isinstance(given, str):
        if given in JOINT:
            raise LowrankError(f"method {given!r} factors groups of layers together, not one alone")
        if given not in METHODS:
            raise unknown("method", given, [*METHODS, *JOINT])
        return METHODS[given](seed=seed)  # type: ignore[call-arg]
    if joint_of(given) is not None:
        raise LowrankError(f"{type(given).__name__} factors groups of layers, not one alone")
    lacking = [verb for verb in ("kinds", "needs", "curve", "factor") if not hasattr(given, verb)]
    if lacking or isinstance(given, type):
        raise LowrankError(
            f"a method has kinds, needs, curve and factor (lowrank.types.Method), got "
            f"{given!r:.80}{f', which lacks {listed(lacking)}' if lacking else ''}"
        )
    return given


def joint_of(given: Given, seed: int = 0) -> JointMethod | None:
    """The joint method that a name or an object stands for; None if it is none."""
    if isinstance(given, str):
        return JOINT[given](seed=seed) if given in JOINT else None  # type: ignore[call-arg]
    return given if isinstance(given, JointMethod) else None


def own_form(given: Given) -> str:
    """What a method stores layers as that has a form of its own, sized by several numbers; else
    ""."""
    method = declared(given)
    return method.own_form if isinstance(method, OwnForm) else ""


def declared(given: Given) -> object:
    """What says of itself what a method is: the class of a registered name, or the object."""
    return METHODS.get(given) if isinstance(given, str) else given


def names_of(method: Method | JointMethod) -> list[str]:
    """What a method is called: as it says itself, or in the registry."""
    if isinstance(method, Named):
        return [method.name]
    kinds: Iterable[tuple[str, Any]] = (*METHODS.items(), *JOINT.items())
    return [name for name, kind in kinds if type(method) is kind]


def refitted_layer(
    module: nn.Module,
    size: Size,
    storage: str,
    gram: Tensor,
    target: Tensor,
    *,
    root: Tensor | None = None,
    least: float = 0.0,
    seed: int = 0,
) -> Any:
    """The best layer of a size for the stream that it reads; see linalg/refit.py.

    In a form of convolutions other than fewer channels it is the weight that the stream asks for,
    W K H'⁻¹, in this form in the metric H'.

    Args:
        size, storage: of the option that was chosen.
        gram, target: H' and K, (in, in).
        root: S (out, out), see `linalg.output_root`.
    """
    weight = layouts.matrix(module)
    if storage in FORMS:
        moved = linalg.regressed(weight, gram, target, least=least)
        shape: torch.Size = module.weight.shape  # type: ignore[assignment]
        return fitted(module, moved.view(shape), size, storage, Metric(gram, root))
    factors = linalg.refit_factors(weight, size[0], gram, target, root=root, least=least, seed=seed)
    up, down = linalg.balance(*factors)
    if layouts.kind(module) == "conv":
        return ChannelConv.from_factors(module, down.to(weight), up.to(weight))
    return LowRankLinear.from_factors(down.to(weight), up.to(weight), layouts.bias(module))


def refitted_form(
    method: Method,
    module: nn.Module,
    option: Option,
    gram: Tensor,
    target: Tensor,
    *,
    least: float = 0.0,
) -> Any:
    """A linear layer in a form of its own for the stream that it reads.

    It is what the method makes of the weight that the stream asks for, W K H'⁻¹, in the metric H'.

    Args:
        gram, target: H' and K, (in, in).
    """
    weight, bias = layouts.matrix(module), layouts.bias(module)
    moved = linalg.regressed(weight, gram, target, least=least).to(weight.device)
    wanted = nn.Linear(moved.shape[1], len(moved), bias=bias is not None, device="meta")
    wanted.weight = nn.Parameter(moved, requires_grad=False)
    if bias is not None:
        wanted.bias = nn.Parameter(bias.detach().to(moved), requires_grad=False)
    return method.factor(wanted, option, Statistics(count=1, gram=gram)).to(weight.dtype)
