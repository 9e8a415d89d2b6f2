"""A request's method, resolved once: it measures and factors sites, alone or in groups.

All that measures or makes layers uses it: plans and their application, the probe, sweeps and
sensitivity. So they all see the same curve of a site, whatever its kind, storage and statistics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import linalg
from ..calibration.statistics import Calibration, only_zeros, statistics_of
from ..errors import LowrankError, listed, unknown
from ..nn import ChannelConv, Form, LowRankLinear
from ..types import (
    Curve,
    Factored,
    HandsOver,
    JointMethod,
    Method,
    Named,
    Nested,
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
    """The methods of a request.

    Attributes:
        method: of single sites; it may delegate those of some kinds to another method.
        joint: of several sites that read one tensor, or None.
        storage: of linear layers: "factors" or "pivoted".
        called: names of these methods in their options and in a plan's entries.
        seed: of methods that other entries name.
    """

    method: Method
    joint: JointMethod | None = None
    storage: str = "factors"
    called: tuple[str, ...] = ()
    seed: int = 0

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that the methods read."""
        own = frozenset() if self.joint is None else self.joint.needs
        return own | self.method.needs

    def for_kind(self, kind: str) -> Method:
        """The method of single sites of this kind."""
        if isinstance(self.method, HandsOver):
            return self.method.for_kind(kind)
        return self.method

    def takes(self, kind: str) -> bool:
        return kind in self.for_kind(kind).kinds

    def is_seen(self, site: Site, calibration: Calibration | None) -> bool:
        """Whether the site has the statistics that its method needs: those of enough inputs, not
        all of them zero."""
        if calibration is None or not self.for_kind(site.kind).needs:
            return True
        least = max(calibration.min_tokens, 1)
        stats = statistics_of(site, calibration)
        return stats.count >= least and not only_zeros(stats)

    def curve(
        self, group: Group, calibration: Calibration | None, *, ranked: bool = False
    ) -> Curve:
        """The curve of a site, or of a group as one; that of plain SVD if the data did not reach
        it (on_missing="data-free").

        Args:
            ranked: whether a convolution must have a rank, of channels, and no other form.
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
        """The new modules of a site or a group, in its order; the model is not changed.

        Raises:
            LowrankError: the method is unknown, lacks statistics, or returned no modules.
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
            expected = f"an nn.Module, got {listed(wrong)}"
            if not wrong:
                expected = f"{len(group)} modules, got {len(made)}"
            raise LowrankError(f"{group[0].title}: {option.method} must return {expected}")
        if option.storage == "pivoted":
            made = [pivoted_layer(new, option.method) for new in made]
        return made

    def factor_each(
        self, group: Group, options: Sequence[Option], stats: Statistics
    ) -> list[list[nn.Module]]:
        """The new modules of several options; as `factor`, but where a method's factors are
        nested, plain ones are cut from the largest, which alone is decomposed."""
        made: dict[Option, list[nn.Module]] = {}
        for option in sorted(options, key=_size, reverse=True):
            if option not in made:
                larger = next((o for o in made if self._is_within(option, o, group)), None)
                if larger is None:
                    made[option] = self.factor(group, option, stats)
                else:
                    assert option.size is not None
                    made[option] = [cast(Form, m).leading(option.size[0]) for m in made[larger]]
        return [made[option] for option in options]

    def _is_within(self, option: Option, larger: Option, group: Group) -> bool:
        """Whether the factors of an option are the leading ones of a larger one."""
        plain = len(group) == 1 and group[0].kind == "linear" and option.storage == "factors"
        if not plain or (option.method, option.storage) != (larger.method, larger.storage):
            return False
        method = self.maker(option.method, group[0], grouped=False)
        return isinstance(method, Nested) and method.nested

    def error(self, site: Site, curve: Curve, new: nn.Module, stats: Statistics) -> float | None:
        """Error of the stored factors, rounding included, in the norm of the site's curve; None
        if the module or the norm does not allow it."""
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
        cross: Tensor,
        extra: Tensor | None = None,
        share: float = 1.0,
        least: float = 0.0,
        seed: int = 0,
    ) -> Any:
        """The layer of an option, refitted in closed form to its inputs in the compressed model.

        Args:
            stats: of the dense model, for the metric of the outputs.
            gram, cross, extra, share: H' and C, (in, in), D (out, in) and λ; see linalg/refit.py.
        """
        method = cast(Method, self.maker(option.method, site, grouped=False))
        root = method.output_metric(stats) if isinstance(method, WeighsOutputs) else None
        if site.kind == "conv" or option.storage in PLAIN:
            return refitted_layer(
                site.module, option.size or (1,), option.storage, gram, cross, extra=extra,
                share=share, root=root, least=least, seed=seed,
            )  # fmt: skip
        return refitted_form(
            method, site.module, option, gram, cross, extra=extra, share=share, least=least,
            out_gram=stats.out_gram,
        )  # fmt: skip

    def maker(self, named: str, site: Site, *, grouped: bool) -> Method | JointMethod:
        """The method that an option or an entry calls `named`.

        Raises:
            LowrankError: the name is neither that of one of these methods nor registered.
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
        """The same, with the names by which the options of its curves call it."""
        names = dict.fromkeys(self.called)
        for curve in curves:
            names |= dict.fromkeys(o.method for o in curve.options if not o.dense)
        return dataclasses.replace(self, called=tuple(names))

    def name(self) -> str:
        """The method's name in plans: the registered one, or that in its options."""
        method = self.joint or self.method
        names = names_of(method)
        known = [name for name in names if name in self.called]
        return (*known, *names, *self.called, type(method).__name__)[0]


def resolve(given: Given, *, seed: int = 0, storage: str = "factors", data: bool) -> Resolved:
    """The methods of a name or an object; None is "whitened" with data and "svd" without."""
    joint = joint_of(given, seed)
    single = given if joint is None else joint.alone
    method = method_of(cast(Any, single) or ("whitened" if data else "svd"), seed)
    return Resolved(method, joint, storage, seed=seed)


def method_of(given: str | Method, seed: int = 0) -> Method:
    """The method of a name, with the given seed; an object is returned as it is."""
    if isinstance(given, str):
        if given in JOINT:
            raise LowrankError(f"method {given!r} factors groups of layers, not single ones")
        if given not in METHODS:
            raise unknown("method", given, [*METHODS, *JOINT])
        return METHODS[given](seed=seed)  # type: ignore[call-arg]
    if joint_of(given) is not None:
        raise LowrankError(f"{type(given).__name__} factors groups of layers, not single ones")
    lacking = [verb for verb in ("kinds", "needs", "curve", "factor") if not hasattr(given, verb)]
    if lacking or isinstance(given, type):
        raise LowrankError(
            f"a method has kinds, needs, curve and factor (lowrank.types.Method), got "
            f"{given!r:.80}{f', which lacks {listed(lacking)}' if lacking else ''}"
        )
    return given


def joint_of(given: Given, seed: int = 0) -> JointMethod | None:
    """The joint method of a name or an object; None if it is not joint."""
    if isinstance(given, str):
        return JOINT[given](seed=seed) if given in JOINT else None  # type: ignore[call-arg]
    return given if isinstance(given, JointMethod) else None


def own_form(given: Given) -> str:
    """The storage of a method with its own form, sized by several numbers; "" for others."""
    method = declared(given)
    return method.own_form if isinstance(method, OwnForm) else ""


def declared(given: Given) -> object:
    """What declares a method's properties: the class of a registered name, or the object."""
    return METHODS.get(given) if isinstance(given, str) else given


def _size(option: Option) -> Size:
    return option.size or ()


def names_of(method: Method | JointMethod) -> list[str]:
    """The names of a method: its own, or those in the registry."""
    if isinstance(method, Named):
        return [method.name]
    kinds: Iterable[tuple[str, Any]] = (*METHODS.items(), *JOINT.items())
    return [name for name, kind in kinds if type(method) is kind]


def refitted_layer(
    module: nn.Module,
    size: Size,
    storage: str,
    gram: Tensor,
    cross: Tensor,
    *,
    extra: Tensor | None = None,
    share: float = 1.0,
    root: Tensor | None = None,
    least: float = 0.0,
    seed: int = 0,
) -> Any:
    """The best layer of a size for its inputs in the compressed model; see linalg/refit.py.

    For a form of convolutions other than fewer channels, the one closest to the regressed weight
    T in the metric H'.

    Args:
        size, storage: of the option that was chosen.
        gram, cross, extra, share: H' and C, (in, in), D (out, in) and λ.
        root: S (out, out), see `linalg.output_root`.
    """
    weight = layouts.matrix(module)
    if storage in FORMS:
        moved = linalg.regressed(weight, gram, cross, share=share, extra=extra, least=least)
        shape: torch.Size = module.weight.shape  # type: ignore[assignment]
        return fitted(module, moved.view(shape), size, storage, Metric(gram, root))
    factors = linalg.refit_factors(
        weight, size[0], gram, cross, share=share, extra=extra, root=root, least=least, seed=seed
    )
    up, down = linalg.balance(*factors)
    if layouts.kind(module) == "conv":
        return ChannelConv.from_factors(module, down.to(weight), up.to(weight))
    return LowRankLinear.from_factors(down.to(weight), up.to(weight), layouts.bias(module))


def refitted_form(
    method: Method,
    module: nn.Module,
    option: Option,
    gram: Tensor,
    cross: Tensor,
    *,
    extra: Tensor | None = None,
    share: float = 1.0,
    least: float = 0.0,
    out_gram: Tensor | None = None,
) -> Any:
    """A linear layer in the method's own form, refitted to its inputs in the compressed model.

    The method factors the regressed weight T in the metric H'.

    Args:
        gram, cross, extra, share: H' and C, (in, in), D (out, in) and λ.
        out_gram: of the dense model's gradients, for methods that weigh outputs.
    """
    weight, bias = layouts.matrix(module), layouts.bias(module)
    moved = linalg.regressed(weight, gram, cross, share=share, extra=extra, least=least).to(
        weight.device
    )
    wanted = nn.Linear(moved.shape[1], len(moved), bias=bias is not None, device="meta")
    wanted.weight = nn.Parameter(moved, requires_grad=False)
    if bias is not None:
        wanted.bias = nn.Parameter(bias.detach().to(moved), requires_grad=False)
    stats = Statistics(count=1, gram=gram, out_gram=out_gram)
    return method.factor(wanted, option, stats).to(weight.dtype)
