"""The interface of factored modules, and the registry of forms.

A form is one file: a subclass of `Form` with its tensors, its forward pass and the members below.
All else works through this interface: plans price it, reports quote its note, recovery refits it,
files rebuild it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..errors import LowrankError, unknown
from ..types import Cost, Size
from .children import class_of
from .lazy import LazyProduct

LAYOUTS = ("linear", "conv1d")
SIZES_OF_KIND = {
    "linear": ("in_features", "out_features"),
    "embedding": ("num_embeddings", "embedding_dim"),
    "conv": ("kernel_size",),
    "mlp": ("in_features", "neurons", "out_features"),
}


INSTEAD = (
    "use torch.jit.trace or torch.export (lowrank.export), or merge it first (lowrank.to_dense)"
)


class Form(nn.Module):
    """A module that represents a weight by the tensors it stores.

    Attributes:
        STORAGE: name of the form in options and plans, such as "factors"; "" for none.
        KIND: kind of the layers it replaces: "linear", "conv" or "embedding". Its `spec` holds
            their sizes under torch's names: in_features and out_features; num_embeddings and
            embedding_dim; or the fields of `Geometry`. "mlp": a module of several layers.
        SIZE: names of the integers of a size, in order.
        WORDS: spec entries that are text.
        SHARES: spec entries that are numbers in [0, 1].
        READS: kind of module whose tensors it reads without storing them; "" for most. A reader's
            spec names that `owner` as "shared", and `bind` sets it.
        CODED: whether it holds integers of few bits in the place of numbers: bytes show its size,
            parameters do not.
        LONGER: names of integer tensors that files of earlier versions hold in two bytes, and that
            have four.
        REFITTED: whether recovery may refit the layer in closed form to other inputs.
        NESTED: whether the form is a sum of `spec()["rank"]` components, the first of which are a
            layer of this form again: `leading`.
        empty: a class method, `empty(**spec)`: the module on the meta device, without memory or
            initialisation.
        layout: of the replaced layer: "linear" (out, in), or "conv1d" (in, out), so that merging
            restores its class. Factors do not depend on it.
    """

    STORAGE: ClassVar[str] = ""
    KIND: ClassVar[str] = "linear"
    SIZE: ClassVar[tuple[str, ...]] = ("rank",)
    WORDS: ClassVar[frozenset[str]] = frozenset()
    SHARES: ClassVar[frozenset[str]] = frozenset()
    READS: ClassVar[str] = ""
    CODED: ClassVar[bool] = False
    LONGER: ClassVar[frozenset[str]] = frozenset()
    REFITTED: ClassVar[bool] = False
    NESTED: ClassVar[bool] = False
    empty: ClassVar[Any]
    layout: str = "linear"

    @classmethod
    def size_cost(
        cls, shape: Sequence[int], size: Size, *, itemsize: int, heads: int = 0
    ) -> Cost | None:
        """Cost of a layer of this size; None where the shape of the weight does not determine it.

        Args:
            shape: (out, in) of the weight as a matrix; (V, D) of a table.
            itemsize: bytes of one number.
            heads: output heads tied to the table.
        """
        return None

    @classmethod
    def note(cls, layers: Sequence[Self]) -> str:
        """A sentence for the report about these layers of the form; "" for none."""
        return ""

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (out, in), computed in `dtype` (None: that of the factors)."""
        raise NotImplementedError

    def spec(self) -> dict[str, Any]:
        """JSON from which `empty` rebuilds the module."""
        raise NotImplementedError

    def cost(self) -> Cost:
        """Cost of the module, biases excluded."""
        raise NotImplementedError

    def leading(self, rank: int, owner: nn.Module | None = None) -> Self:
        """The layer of the first `rank` components alone, in tensors of its own; a bias stays the
        same object.

        Args:
            owner: what it reads from now on, if it reads another module: that one's `leading`.

        Raises:
            LowrankError: the form is not `NESTED`.
        """
        raise LowrankError(f"a {type(self).__name__} has no components that can be cut")

    @property
    def not_linear(self) -> str:
        """Why the layer has no dense weight; "" if it has one."""
        return ""

    def fault(self) -> str:
        """What is wrong with the integers it stores, such as an index out of range; "" if nothing.

        Files may be damaged: it is asked after loading, when there are values.
        """
        return ""

    @property
    def owner(self) -> nn.Module | None:
        """The module whose tensors this one reads without storing them; None for most."""
        return None

    def __prepare_scriptable__(self) -> Self:
        """By which `torch.jit.script` asks.

        Raises:
            LowrankError: always; its compiler knows too little of Python.
        """
        raise LowrankError(f"a {type(self).__name__} cannot be scripted: {INSTEAD}")

    def bind(self, owner: nn.Module) -> Self:
        """Read the tensors of `owner` from now on.

        Raises:
            LowrankError: the form shares nothing, or the owner has other sizes.
        """
        raise LowrankError(f"a {type(self).__name__} shares nothing")


class LinearForm(Form):
    """A form of a linear layer: with `in_features`, `out_features` and `bias`, like nn.Linear."""

    @property
    def weight(self) -> Tensor:
        """The dense weight (out, in), computed when used, for code that reads `.weight`."""
        sizes = self.spec()
        shape = (sizes["out_features"], sizes["in_features"])
        return LazyProduct.of(shape, floating(self), self.dense_weight)


def check_traceable(module: Form, x: Tensor) -> None:
    """Raises LowrankError for a proxy of torch.fx, in forms whose way depends on shapes."""
    if isinstance(x, torch.fx.Proxy):
        raise LowrankError(f"torch.fx cannot trace a {type(module).__name__}: {INSTEAD}")


def floating(module: nn.Module) -> Tensor:
    """A tensor with the dtype and device that a form computes in: its first floating parameter."""
    found = (p for p in module.parameters() if p.is_floating_point())
    return next(found, torch.empty(0))


FACTORED: dict[str, type[Form]] = {}  # filled in __init__.py


def register(form: type[Form]) -> type[Form]:
    """Add a form to the registry; usable as a class decorator.

    Raises:
        LowrankError: it is not a `Form`, or its name or storage is taken.
    """
    if not (isinstance(form, type) and issubclass(form, Form)):
        raise LowrankError(f"a form is a subclass of lowrank.nn.Form, got {form!r:.80}")
    if form.KIND not in SIZES_OF_KIND:
        raise unknown(f"KIND of {form.__name__}", str(form.KIND), SIZES_OF_KIND)
    same_name = FACTORED.get(form.__name__, form)
    same_storage = form_of(form.STORAGE, form.KIND) if form.STORAGE else None
    if same_name is not form or same_storage not in (None, form):
        raise LowrankError(
            f"a form {form.__name__} or a storage {form.STORAGE!r} is already registered: "
            "choose other names"
        )
    FACTORED[form.__name__] = form
    return form


def form_of(storage: str, kind: str = "linear") -> type[Form] | None:
    """The form registered for a storage and a kind; None without one."""
    forms = (f for f in FACTORED.values() if (storage, kind) == (f.STORAGE, f.KIND))
    return next(forms, None) if storage else None


def is_factored(module: nn.Module) -> bool:
    """Whether a module's exact class is a registered form; a subclass may compute otherwise."""
    return class_of(module) in FACTORED.values()


def notes_of(modules: Iterable[nn.Module | None]) -> list[str]:
    """The notes of all forms about their layers; forms that share `note` give one."""
    layers: dict[object, list[Form]] = {}
    for module in modules:
        if isinstance(module, Form):
            method: Any = type(module).note
            layers.setdefault(method.__func__, []).append(module)
    notes = (type(group[0]).note(group) for group in layers.values())
    return [note for note in notes if note]


def remember_layout(module: nn.Module, layout: str) -> None:
    """Record on a factored module the layout of the layer that it replaced.

    Raises:
        LowrankError: unknown layout.
    """
    if layout not in LAYOUTS:
        raise unknown("layout", str(layout), LAYOUTS)
    if isinstance(module, Form) and layout != module.layout:
        module.layout = layout


def describe(module: Form) -> dict[str, Any]:
    """JSON from which `build` makes the same module, empty: type, sizes, layout."""
    layout = {} if module.layout == "linear" else {"layout": module.layout}
    return {"type": class_of(module).__name__, **module.spec(), **layout}


def build(spec: Mapping[str, Any], where: str) -> Form:
    """The empty module (meta device) of a stored spec.

    Raises:
        LowrankError: type or layout is unknown, or the sizes do not fit; `where` is named.
    """
    if not isinstance(spec, dict) or not isinstance(spec.get("type"), str):
        raise LowrankError(f"{where}: expected a spec with a 'type', got {spec!r}")
    if spec["type"] not in FACTORED:
        raise unknown(f"factored module at {where}:", spec["type"], FACTORED)
    layout = spec.get("layout", "linear")
    if layout not in LAYOUTS:
        raise unknown(f"layout at {where}:", str(layout), LAYOUTS)
    # "shared" names a module of the model, which is unknown here: io binds it later.
    sizes = {k: v for k, v in spec.items() if k not in ("type", "layout", "shared")}
    form = FACTORED[spec["type"]]
    _check_entries(form, sizes, where)
    try:
        built = form.empty(**sizes)
    except (TypeError, RuntimeError, OverflowError, AssertionError, ValueError) as error:
        why = f": {error}" if isinstance(error, LowrankError) else ""
        message = f"{where}: {spec['type']} cannot be built from {sizes}{why}"
        raise LowrankError(message) from error
    remember_layout(built, layout)
    return built


def _check_entries(form: type[Form], sizes: Mapping[str, Any], where: str) -> None:
    """Raises LowrankError unless every entry is a size, a word or a share, as the form declares."""
    numbers = {k: v for k, v in sizes.items() if k not in form.WORDS | form.SHARES}
    bad_sizes = {
        **{key: value for key, value in numbers.items() if not _is_size(value)},
        **{k: sizes[k] for k in form.WORDS if k in sizes and not isinstance(sizes[k], str)},
    }
    if bad_sizes:
        raise LowrankError(f"{where}: sizes must be integers >= 0, got {bad_sizes}")
    bad_shares = {k: sizes[k] for k in form.SHARES if k in sizes and not _is_share(sizes[k])}
    if bad_shares:
        raise LowrankError(f"{where}: shares must be numbers in [0, 1], got {bad_shares}")


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_size(value: Any) -> bool:
    """An integer >= 0; for a convolution also a list of them, or a kind of padding."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(v, int) and v >= 0 for v in value)
    return value in ("same", "valid") or (isinstance(value, int) and value >= 0)
