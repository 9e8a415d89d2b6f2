"""What a factored module says of itself, and the registry in which each form has a row.

A form is one file: a subclass of `Form` with its tensors, its forward pass and the answers below.
Nothing else knows of it: plans price it, reports quote its note, recovery refits it, files rebuild
it, all through these answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..errors import LowrankError, unknown
from ..types import Cost, Size
from .lazy import LazyProduct

LAYOUTS = ("linear", "conv1d")
SIZES_OF_KIND = {
    "linear": ("in_features", "out_features"),
    "embedding": ("num_embeddings", "embedding_dim"),
    "conv": ("kernel_size",),
}


class Form(nn.Module):
    """A module that stands for a weight by the tensors it stores.

    Attributes:
        STORAGE: what options and plans call the form, such as "factors"; "" where none names it.
        KIND: of the layers that it replaces: "linear", "conv" or "embedding". Its `spec` holds
            their sizes under torch's names: in_features and out_features; num_embeddings and
            embedding_dim; or all that `Geometry` holds.
        SIZE: what the integers of a size are called, in order.
        WORDS: entries of the spec that are text.
        SHARES: entries of the spec that are numbers in [0, 1].
        READS: what kind of module it reads tensors of, which it does not store itself; "" for most.
            A reader's spec names that `owner` as "shared", and `bind` gives it the module.
        REFITTED: whether recovery may make the layer anew, in closed form, for other inputs.
        empty: a class method, `empty(**spec)`: the module on the meta device, without memory or
            initialisation.
        layout: of the replaced layer: "linear" (out, in), or "conv1d" (in, out), so that a merged
            layer is of the class that was there. Factors do not need it.
    """

    STORAGE: ClassVar[str] = ""
    KIND: ClassVar[str] = "linear"
    SIZE: ClassVar[tuple[str, ...]] = ("rank",)
    WORDS: ClassVar[frozenset[str]] = frozenset()
    SHARES: ClassVar[frozenset[str]] = frozenset()
    READS: ClassVar[str] = ""
    REFITTED: ClassVar[bool] = False
    empty: ClassVar[Any]
    layout: str = "linear"

    @classmethod
    def size_cost(
        cls, shape: Sequence[int], size: Size, *, itemsize: int, heads: int = 0
    ) -> Cost | None:
        """What a layer of this size costs; None where the shape of the weight does not say it.

        Args:
            shape: (out, in) of the weight as a matrix; (V, D) of a table.
            itemsize: bytes of one number.
            heads: output heads that multiply by the same table.
        """
        return None

    @classmethod
    def note(cls, layers: Sequence[Self]) -> str:
        """What a report has to say of these layers of the form, in a sentence; "" for nothing."""
        return ""

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix (out, in) that the module stands for, multiplied in `dtype` (None: that of
        the factors)."""
        raise NotImplementedError

    def spec(self) -> dict[str, Any]:
        """JSON that `empty` rebuilds the module from."""
        raise NotImplementedError

    def cost(self) -> Cost:
        """What is stored, biases excluded."""
        raise NotImplementedError

    @property
    def not_linear(self) -> str:
        """Why no dense weight stands for this layer; "" if one does."""
        return ""

    @property
    def owner(self) -> nn.Module | None:
        """The module whose tensors this one reads and does not store; None for most."""
        return None

    def bind(self, owner: nn.Module) -> Self:
        """Read these tensors from now on.

        Raises:
            LowrankError: the form reads nothing of others, or the owner has other sizes.
        """
        raise LowrankError(f"a {type(self).__name__} shares nothing")


class LinearForm(Form):
    """A form of a linear layer: with `in_features`, `out_features` and `bias` as nn.Linear has."""

    @property
    def weight(self) -> Tensor:
        """The dense weight (out, in), multiplied when it is used: for code that reads `.weight`."""
        sizes, like = self.spec(), next(p for p in self.parameters() if p.is_floating_point())
        shape = (sizes["out_features"], sizes["in_features"])
        return LazyProduct.of(shape, like, self.dense_weight)


FACTORED: dict[str, type[Form]] = {}  # filled at the door of this room


def register(form: type[Form]) -> type[Form]:
    """Add a form of your own to the registry; it may decorate the class.

    Raises:
        LowrankError: it is no `Form`, or another one has its name or its storage.
    """
    if not (isinstance(form, type) and issubclass(form, Form)):
        raise LowrankError(f"a form is a subclass of lowrank.nn.Form, got {form!r:.80}")
    if form.KIND not in SIZES_OF_KIND:
        raise unknown(f"KIND of {form.__name__}", str(form.KIND), SIZES_OF_KIND)
    there = FACTORED.get(form.__name__, form)
    named = form_of(form.STORAGE, form.KIND) if form.STORAGE else None
    if there is not form or named not in (None, form):
        raise LowrankError(
            f"there is a form {form.__name__} or a storage {form.STORAGE!r} already: "
            "choose other names"
        )
    FACTORED[form.__name__] = form
    return form


def form_of(storage: str, kind: str = "linear") -> type[Form] | None:
    """The form that an option of this storage is built as; None for a storage without one."""
    forms = (f for f in FACTORED.values() if (storage, kind) == (f.STORAGE, f.KIND))
    return next(forms, None) if storage else None


def is_factored(module: nn.Module) -> bool:
    """Whether a module is of a registered form: exactly, for a subclass may compute something
    else."""
    return type(module) in FACTORED.values()


def notes_of(modules: Iterable[nn.Module | None]) -> list[str]:
    """What each form has to say of all its layers; forms with one answer give it once."""
    layers: dict[object, list[Form]] = {}
    for module in modules:
        if isinstance(module, Form):
            answer: Any = type(module).note
            layers.setdefault(answer.__func__, []).append(module)
    notes = (type(of_one[0]).note(of_one) for of_one in layers.values())
    return [note for note in notes if note]


def remember_layout(module: nn.Module, layout: str) -> None:
    """Note on a factored module which layout it replaced.

    Raises:
        LowrankError: the layout is unknown.
    """
    if layout not in LAYOUTS:
        raise unknown("layout", str(layout), LAYOUTS)
    if isinstance(module, Form) and layout != module.layout:
        module.layout = layout


def describe(module: Form) -> dict[str, Any]:
    """JSON that `build` turns into the same module, empty: its type, its sizes, its layout."""
    noted = {} if module.layout == "linear" else {"layout": module.layout}
    return {"type": type(module).__name__, **module.spec(), **noted}


def build(spec: Mapping[str, Any], where: str) -> Form:
    """The empty module (meta device) that a stored spec stands for.

    Raises:
        LowrankError: type or layout are unknown, or the sizes do not fit; `where` is named.
    """
    if not isinstance(spec, dict) or not isinstance(spec.get("type"), str):
        raise LowrankError(f"{where}: expected a spec with a 'type', got {spec!r}")
    if spec["type"] not in FACTORED:
        raise unknown(f"factored module at {where}:", spec["type"], FACTORED)
    layout = spec.get("layout", "linear")
    if layout not in LAYOUTS:
        raise unknown(f"layout at {where}:", str(layout), LAYOUTS)
    # "shared" names a module of a model, of which nothing is known here: io binds what is built.
    sizes = {k: v for k, v in spec.items() if k not in ("type", "layout", "shared")}
    form = FACTORED[spec["type"]]
    _check_entries(form, sizes, where)
    try:
        built = form.empty(**sizes)
    except (TypeError, RuntimeError, OverflowError, AssertionError, ValueError) as error:
        why = f": {error}" if isinstance(error, LowrankError) else ""
        said = f"{where}: {spec['type']} cannot be built from {sizes}{why}"
        raise LowrankError(said) from error
    remember_layout(built, layout)
    return built


def _check_entries(form: type[Form], sizes: Mapping[str, Any], where: str) -> None:
    """Raises LowrankError unless every entry is a size, a word or a share, as the form has it."""
    numbers = {k: v for k, v in sizes.items() if k not in form.WORDS | form.SHARES}
    wrong = {
        **{key: value for key, value in numbers.items() if not _is_size(value)},
        **{k: sizes[k] for k in form.WORDS if k in sizes and not isinstance(sizes[k], str)},
    }
    if wrong:
        raise LowrankError(f"{where}: sizes must be integers >= 0, got {wrong}")
    odd = {k: sizes[k] for k in form.SHARES if k in sizes and not _is_share(sizes[k])}
    if odd:
        raise LowrankError(f"{where}: shares must be numbers in [0, 1], got {odd}")


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_size(value: Any) -> bool:
    """An integer >= 0; of a convolution one a dimension, or a kind of padding."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(v, int) and v >= 0 for v in value)
    return value in ("same", "valid") or (isinstance(value, int) and value >= 0)
