"""Rank and bits under one budget of bytes: integers for a weight, its factors, or both.

Every layer may become a weight of 2 to 8 bits, two factors of 4 or 8 bits, or factors of 8 bits and
a weight of few bits for what they leave, W ≈ Q(W − L) + L. Rounding and low rank minimise the same
estimate of the loss, ‖G^½ (W − Ŵ) H^½‖², as in two_sided.py, so that a policy compares them at
their bytes in the file. Rounding carries errors on as in linalg/quantise.py (GPTQ, arXiv
2210.17323, and on both sides YAQA, arXiv 2505.22988).

Q and L are alternated, from the L of W. SRR (arXiv 2602.02001) splits the rank in closed form
between W and what quantisation leaves; half and half was behind alternation here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn

from .. import linalg
from ..errors import LowrankError, listed, unknown
from ..linalg.gram import full_precision, safe_root
from ..nn import QuantizedFactorsLinear, QuantizedLinear, QuantizedLowRankLinear, form_of
from ..types import Cost, Curve, Option, Site, Size, Statistics, Unit
from ..walk import layouts
from .common import gram_of, out_gram_of

Rounding = Literal["carried", "nearest"]
FORMS = {form.STORAGE: form for form in
         (QuantizedLinear, QuantizedFactorsLinear, QuantizedLowRankLinear)}  # fmt: skip
WHOLE, FACTORS, BOTH = FORMS
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (0, 128, 32)
FACTOR_BITS = (4, 8)
LOW_BITS = 4  # most bits of a weight beside factors
STEPS = 24  # ranks of factors beside a weight
ROUNDS = 2  # of alternation
RIDGE = 1e-4  # of the mean diagonal, for `up`
TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Quantized:
    """Options: `forms`, the storages to choose among; `bits` of a weight, `groups` of inputs that
    have one scale (0: a whole row), `factor_bits` of factors, the most of them beside a weight;
    `rounding`, "carried" or "nearest"; `two_sided`, False for the error of the outputs, which needs
    no gradients; `rounds` of alternation; `seed` as for `SVD`.

    Sizes are those of the storage: (bits, group), (rank, bits), (rank, factor bits, bits, group).
    Cost rises and error falls by bytes alone: codes are no parameters. The curve is an estimate:
    every number is taken to be rounded by as much as it is alone; factors beside a weight are those
    of what its codes leave, without alternation, and lose as large a share as those of the weight.
    """

    seed: int = 0
    forms: tuple[str, ...] = tuple(FORMS)
    bits: tuple[int, ...] = BITS
    groups: tuple[int, ...] = GROUPS
    factor_bits: tuple[int, ...] = FACTOR_BITS
    rounding: Rounding = "carried"
    two_sided: bool = True
    rounds: int = ROUNDS
    kinds = frozenset({"linear"})
    units: ClassVar[frozenset[Unit]] = frozenset({"bytes"})
    own_form = WHOLE

    def __post_init__(self) -> None:
        for form in self.forms or ("",):
            if form not in FORMS:
                raise unknown("form", str(form), FORMS)
        if self.rounding not in get_args(Rounding):
            raise unknown("rounding", str(self.rounding), get_args(Rounding))
        for name in ("bits", "factor_bits"):
            given = getattr(self, name)
            if not given or not all(isinstance(b, int) and 1 <= b <= 8 for b in given):
                raise LowrankError(f"{name} must be integers in [1, 8], got {given!r}")
        if not self.groups or not all(isinstance(g, int) and g >= 0 for g in self.groups):
            raise LowrankError(f"groups must be integers >= 0, got {self.groups!r}")
        if not isinstance(self.rounds, int) or self.rounds < 0:
            raise LowrankError(f"rounds must be an integer >= 0, got {self.rounds!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram", "out_gram"} if self.two_sided else {"gram"})

    def curve(self, site: Site, stats: Statistics) -> Curve:
        weight = _wide(layouts.matrix(site.module))
        gram, root = self._metric(stats, *site.shape)
        total = linalg.squared_error(_rooted(root, weight), torch.zeros_like(weight), gram)
        found = self._estimates(weight, gram, root, layouts.matrix(site.module).dtype)
        options = _by_bytes(site, ((s, size, min(error, total)) for s, size, error in found))
        norm = "fisher" if self.two_sided else "output"
        return Curve(site.names, options, total, None, norm, exact=False)

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        weight, bias = layouts.matrix(module), layouts.bias(module)
        form, size = _form_and_size(option, tuple(weight.shape))
        coder = _Coder(self, _wide(weight), *self._metric(stats, *weight.shape), weight.dtype)
        parts = coder.parts(form.STORAGE, size)
        names = dict(zip(form.SIZE, size, strict=True))
        out_features, in_features = weight.shape
        layer = form.empty(
            in_features=in_features, out_features=out_features, bias=bias is not None, **names
        )
        return cast(nn.Module, layer.hold(bias=bias, **parts))

    def error(self, module: nn.Module, weight: Tensor, stats: Statistics) -> float:
        """‖G^½ (W − Ŵ) H^½‖² of any Ŵ (out, in), in the norm of the curve."""
        gram, root = self._metric(stats, *weight.shape)
        diff = layouts.matrix(module).detach().double() - weight.detach().double()
        return linalg.squared_error(_rooted(root, diff), diff.new_zeros(()), gram)

    def output_metric(self, stats: Statistics) -> Tensor | None:
        """S with SᵀS = G, damped; None without gradients."""
        known = self.two_sided and stats.out_gram is not None
        return linalg.output_root(cast(Tensor, stats.out_gram)) if known else None

    def _metric(
        self, stats: Statistics, out_features: int, in_features: int
    ) -> tuple[Tensor, Tensor | None]:
        gram = gram_of(stats, in_features)
        if not self.two_sided:
            return gram, None
        return gram, linalg.output_root(out_gram_of(stats, out_features))

    def _estimates(
        self, weight: Tensor, gram: Tensor, root: Tensor | None, dtype: torch.dtype
    ) -> Iterator[tuple[str, Size, float]]:
        """Storages and sizes with their errors."""
        inputs, most = weight.shape[1], min(weight.shape)
        coder = _Coder(self, weight, gram, root, dtype)
        groups = sorted({min(group, inputs) or inputs for group in self.groups})
        for bits, group in ((b, g) for b in self.bits for g in groups):
            if WHOLE not in self.forms and (BOTH not in self.forms or bits > LOW_BITS):
                continue
            left = coder.expected(bits, group)
            if WHOLE in self.forms:
                yield WHOLE, (bits, group), float(left.square().sum())
            if BOTH in self.forms and bits <= LOW_BITS and group == groups[-1]:
                tails = linalg.tails(linalg.energies(left)).tolist()
                ranks = sorted({max(1, most // 2 * step // STEPS) for step in range(1, STEPS + 1)})
                beside = max(self.factor_bits)
                share = float(coder.noise(beside).sum() / coder.tails[0].clamp(min=TINY))
                for rank in ranks:
                    error = tails[rank] + share * (tails[0] - tails[rank])
                    yield BOTH, (rank, beside, bits, group), error
        if FACTORS in self.forms:
            for bits in self.factor_bits:
                noise = coder.noise(bits).cumsum(0)
                errors = (coder.tails[1:] + noise).tolist()
                for rank, error in enumerate(errors, 1):
                    yield FACTORS, (rank, bits), error


class _Coder:
    """Codes and scales of one weight (out, in), in the metric of its layer."""

    def __init__(
        self,
        method: Quantized,
        weight: Tensor,
        gram: Tensor,
        root: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.method, self.weight, self.gram, self.root = method, weight, gram, root
        self.dtype = dtype
        self.carry = linalg.carrier(gram, root)
        self.rows = self.carry._replace(left=None, outputs=None, output_size=None)
        self.importance = self.gram.diagonal()

    @cached_property
    def whole_factors(self) -> tuple[Tensor, Tensor]:
        """up (out, k) and down (k, in) of full rank."""
        return self._factors(self.weight, min(self.weight.shape))

    @cached_property
    def strengths(self) -> tuple[Tensor, Tensor]:
        """‖S u_j‖² and ‖H^½ d_j‖² of these, (k,)."""
        up, down = self.whole_factors
        return _rooted(self.root, up).square().sum(0), ((down @ self.gram) * down).sum(1)

    @cached_property
    def tails(self) -> Tensor:
        """Error of the leading factors at every rank, (k + 1,)."""
        up, down = self.strengths
        return linalg.tails(up * down)

    def noise(self, bits: int) -> Tensor:
        """What rounding the factors adds for each component, (k,), before `up` is refitted."""
        (up, down), (of_up, of_down) = self.whole_factors, self.strengths
        rows, columns = self._expected(down, bits, self.rows), self._alone(up.T, bits)
        if self.carry.output_size is not None:
            columns = columns * self.carry.output_size.sqrt()
        return of_up * rows.square().sum(1) + of_down * columns.square().sum(1)

    def expected(self, bits: int, group: int) -> Tensor:
        """What rounding the weight leaves in the metric, (out, in)."""
        return self._expected(self.weight, bits, self.carry, group)

    def _expected(self, rows: Tensor, bits: int, carry: linalg.Carrier, group: int = 0) -> Tensor:
        if self.method.rounding == "nearest":
            return linalg.in_metric(self._alone(rows, bits, group), carry)
        step = self._step(rows, bits, group or rows.shape[1])[1]
        return linalg.expected_error(rows, step, bits, carry)

    def _alone(self, rows: Tensor, bits: int, group: int = 0) -> Tensor:
        """What rounding each number alone leaves of it."""
        step = self._step(rows, bits, group or rows.shape[1])[1]
        return rows - linalg.decoded(linalg.nearest(rows, step, bits), step, bits)

    def parts(self, storage: str, size: Size) -> dict[str, tuple[Tensor, Tensor]]:
        """Codes and scales by the part's name."""
        if storage == WHOLE:
            return {"whole": self._coded(self.weight, *size)[0]}
        if storage == FACTORS:
            return self._factored(self.weight, *size)[0]
        rank, factor_bits, bits, group = size
        found, least = {}, float("inf")
        low = self._factored(self.weight, rank, factor_bits)[1]
        for _ in range(self.method.rounds + 1):
            whole, near = self._coded(self.weight - low, bits, group)
            factors, low = self._factored(self.weight - near, rank, factor_bits)
            error = self._error(near + low)
            if error < least:
                found, least = {"whole": whole, **factors}, error
        return found

    def _error(self, near: Tensor) -> float:
        rest = _rooted(self.root, self.weight - near)
        return linalg.squared_error(rest, torch.zeros_like(rest), self.gram)

    def _step(self, weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
        """The scales of rows of inputs, or of outputs, and that of each number."""
        known = weight.shape[1] == len(self.importance)
        importance = self.importance if known else torch.ones_like(weight[0])
        scale = linalg.group_scales(weight, bits, group, importance, self.dtype)
        return scale, linalg.spread_scales(scale, group, weight.shape[1])

    def _codes(self, weight: Tensor, step: Tensor, bits: int, carry: linalg.Carrier) -> Tensor:
        if self.method.rounding == "carried":
            return linalg.carried_codes(weight, step, bits, carry)
        return linalg.nearest(weight, step, bits)

    def _coded(self, weight: Tensor, bits: int, group: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Codes and scales of a weight (out, in), and what they stand for."""
        scale, step = self._step(weight, bits, group)
        codes = self._codes(weight, step, bits, self.carry)
        return (codes, scale.to(self.dtype)), linalg.decoded(codes.to(step), step, bits)

    def _factors(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        up, down = linalg.factor(_rooted(self.root, weight), rank, self.gram, seed=self.method.seed)
        up = up if self.root is None else linalg.unrooted(self.root, up)
        return linalg.balance(up.double(), down.double())

    def _factored(
        self, weight: Tensor, rank: int, bits: int
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
        """Codes and scales of the factors of a weight (out, in), and their product.

        `up` is refitted to what the codes of `down` give, whose Gram matrix carries its errors on.
        """
        up, down = self._factors(weight, rank)
        scale, step = self._step(down, bits, down.shape[1])
        codes = self._codes(down, step, bits, self.rows)
        near = linalg.decoded(codes.to(step), step, bits)
        parts = {"down": (codes, scale.to(self.dtype))}
        seen = near @ self.gram.double()
        inner = seen @ near.T  # Gram of what `up` reads
        ridge = RIDGE * float(inner.diagonal().mean())
        missed = (weight.double() - up @ near) @ seen.T
        up = up + torch.cholesky_solve(missed.T, safe_root(inner, ridge)).T
        scale, step = self._step(up.T.contiguous(), bits, len(up))
        carry = linalg.Carrier(*linalg.carrier(inner)[:3], *self.carry[3:])
        codes = self._codes(up, step.T, bits, carry)
        parts["up"] = codes.T, scale.to(self.dtype)
        product = linalg.decoded(codes.to(step), step.T, bits) @ near
        return parts, product.to(self.weight)


def _wide(weight: Tensor) -> Tensor:
    """A weight in the precision in which it is rounded."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _rooted(root: Tensor | None, weight: Tensor) -> Tensor:
    """S W (out, in)."""
    if root is None:
        return weight.double()
    with full_precision(weight):
        return root @ weight.to(root)


def _by_bytes(site: Site, estimates: Iterable[tuple[str, Size, float]]) -> tuple[Option, ...]:
    """The front of least error at its bytes, of options smaller than the dense weight, and that."""
    itemsize = layouts.matrix(site.module).dtype.itemsize
    options = [
        Option(WHOLE, size, storage, _cost(storage, site.shape, size, itemsize), error)
        for storage, size, error in estimates
    ]
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost.bytes, o.error)):
        small = option.cost.bytes < site.cost.bytes and option.cost.params < site.cost.params
        if small and (not kept or option.error < kept[-1].error):
            kept.append(option)
    return (*kept, Option("dense", None, "dense", site.cost, 0.0))


def _cost(storage: str, shape: tuple[int, int], size: Size, itemsize: int) -> Cost:
    cost = FORMS[storage].size_cost(shape, size, itemsize=itemsize)
    assert cost is not None
    return cost


def _form_and_size(option: Option, shape: tuple[int, ...]) -> tuple[type[QuantizedLinear], Size]:
    """The form of an option and its size, checked against the shape (out, in) of the layer.

    Raises:
        LowrankError: the storage is none of these, or the size does not fit.
    """
    form = form_of(option.storage)
    if form is None or option.storage not in FORMS:
        raise unknown("storage", option.storage, FORMS)
    size = option.size or ()
    whole = len(size) == len(form.SIZE) and min(size) >= 1
    if not whole or dict(zip(form.SIZE, size, strict=True)).get("rank", 1) > min(shape):
        raise LowrankError(
            f"expected a size ({listed(form.SIZE, 4)}) for shape {shape}, got {option.size}"
        )
    return cast(type[QuantizedLinear], form), size
