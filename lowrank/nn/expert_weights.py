"""One weight of all experts of a mixture, held as a linear layer for each expert.

transformers keeps a mixture's weights in parameters (experts, out, in), or (experts, in, out). With
an `ExpertWeights` in the place of such a parameter, the code of the mixture stays as it is: it
indexes, transposes and multiplies what it takes for a tensor, and the products run the layers. So
hooks see what each expert reads, methods meet plain linear layers, and any of them may be factored.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowrankError
from .children import is_plain
from .form import Form


class ExpertWeights(nn.Module):
    """Layers without bias, children "0", "1", … in the order of the experts.

    Attributes:
        transposed: whether it stands for (experts, in, out), not (experts, out, in).
        place: of the weight among the parameters of its module, whose order optimizers rely on.
    """

    transposed: bool
    place: int

    def __init__(self, layers: Iterable[nn.Module], *, transposed: bool, place: int = 0) -> None:
        super().__init__()
        self.transposed, self.place = transposed, place
        for index, layer in enumerate(layers):
            self.add_module(str(index), layer)

    @classmethod
    def split(cls, weight: Tensor, *, transposed: bool, place: int = 0) -> ExpertWeights:
        """Layers that are views of a weight (experts, out, in), or (experts, in, out)."""

        def layer(part: Tensor) -> nn.Linear:
            matrix = part.T if transposed else part
            linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(matrix, requires_grad=weight.requires_grad)
            return linear

        return cls(map(layer, weight.detach().unbind()), transposed=transposed, place=place)

    @property
    def is_dense(self) -> bool:
        """Whether every layer is a plain dense one."""
        return all(type(layer) is nn.Linear and is_plain(layer) for layer in self.layers())

    def joined(self) -> nn.Parameter:
        """The weight as one parameter; of dense layers only."""
        matrices: list[Tensor] = [layer.weight.detach() for layer in self.layers()]  # type: ignore[operator]
        dtype = functools.reduce(torch.promote_types, (m.dtype for m in matrices))
        whole = torch.stack([(m.T if self.transposed else m).to(dtype) for m in matrices])
        return nn.Parameter(whole, requires_grad=self.requires_grad)

    def layers(self) -> Iterator[nn.Module]:
        return iter(self._modules.values())  # type: ignore[arg-type]

    @property
    def shape(self) -> torch.Size:
        first: Any = next(self.layers())
        sizes = (first.out_features, first.in_features)
        return torch.Size((len(self), *(sizes[::-1] if self.transposed else sizes)))

    @property
    def ndim(self) -> int:
        return 3

    @property
    def dtype(self) -> torch.dtype:
        return self._like().dtype

    @property
    def device(self) -> torch.device:
        return self._like().device

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """A tensor of another dtype or device, as of a tensor; a model is moved as a whole."""
        return Product(self).to(*args, **kwargs)

    @property
    def requires_grad(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters())

    def _like(self) -> Tensor:
        return next(p for p in self.parameters() if p.dtype.is_floating_point)

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: Any) -> Product:
        return Product(self)[index]

    def __iter__(self) -> Iterator[Product]:
        return (self[index] for index in range(len(self)))

    def __getattr__(self, name: str) -> Any:
        """What a tensor has and a module has not."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Product, name):
                raise
            return getattr(Product(self), name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        own = tuple(Product(a) if isinstance(a, ExpertWeights) else a for a in args)
        return func(*own, **(kwargs or {}))

    def extra_repr(self) -> str:
        return f"{', '.join(map(str, self.shape))}"


class Product:
    """A factor in a product that an `ExpertWeights` will carry out: all of it, the weight of one
    expert, or of a list of experts. Anything else makes a dense tensor of it."""

    def __init__(
        self, weights: ExpertWeights, index: int | Tensor | None = None, flipped: bool = False
    ) -> None:
        """
        Args:
            index: of the expert, or of several (n,); None for all.
            flipped: the last two axes are exchanged.
        """
        self.weights, self.index, self.flipped = weights, index, flipped

    @property
    def reads_rows(self) -> bool:
        """Whether it is laid out as (…, in, out), to be multiplied from the left."""
        return self.weights.transposed != self.flipped

    @property
    def shape(self) -> torch.Size:
        count, *sides = self.weights.shape
        sides = sides[::-1] if self.flipped else sides
        if self.index is None:
            return torch.Size((count, *sides))
        return torch.Size(sides if isinstance(self.index, int) else (len(self.index), *sides))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.dtype

    @property
    def device(self) -> torch.device:
        return self.weights.device

    @property
    def T(self) -> Product:
        return self._exchanged()

    @property
    def mT(self) -> Product:
        return self._exchanged()

    def size(self, axis: int | None = None) -> Any:
        return self.shape if axis is None else self.shape[axis]

    def dim(self) -> int:
        return self.ndim

    def t(self) -> Product:
        return self._exchanged()

    def contiguous(self) -> Product:
        return self

    def transpose(self, one: int, other: int) -> Any:
        axes = {one % self.ndim, other % self.ndim}
        if axes == {self.ndim - 2, self.ndim - 1}:
            return self._exchanged()
        return self.dense().transpose(one, other)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        same = all(value in (self.dtype, self.device) for value in given)
        return self if same else self.dense().to(*args, **kwargs)

    def _exchanged(self) -> Product:
        return Product(self.weights, self.index, not self.flipped)

    def __getitem__(self, index: Any) -> Any:
        if self.index is None:
            if isinstance(index, Tensor) and index.dtype not in (torch.bool, torch.uint8):
                one = index.ndim == 0
                if one or index.ndim == 1:
                    return Product(self.weights, int(index) if one else index, self.flipped)
            elif isinstance(index, int):
                return Product(self.weights, range(len(self.weights))[index], self.flipped)
        return self.dense()[index]

    def dense(self) -> Tensor:
        """The factor as a tensor, from the layers' dense weights."""
        layers = list(self.weights.layers())
        if isinstance(self.index, int):
            return self._laid_out(_matrix(layers[self.index]))
        chosen = range(len(layers)) if self.index is None else self.index.tolist()
        made = {i: self._laid_out(_matrix(layers[i])) for i in set(chosen)}
        return torch.stack([made[i] for i in chosen])

    def _laid_out(self, matrix: Tensor) -> Tensor:
        return matrix.T if self.reads_rows else matrix

    def run(self, x: Tensor, offs: Tensor | None = None) -> Tensor:
        """x times its transpose, row by row: (…, in) -> (…, out).

        Args:
            x: (…, in) for one expert; (n, rows, in) for n of them; (rows, in) sorted by expert, if
                `offs` (experts,) says where the rows of each end.
        """
        layers = list(self.weights.layers())
        if isinstance(self.index, int):
            return _run(layers[self.index], x)
        if offs is not None and torch.compiler.is_exporting():
            places = torch.arange(x.shape[0], device=x.device)  # len() would fix it
            return self._masked(layers, x, (places[:, None] >= offs).sum(1))
        if offs is not None:
            ends = offs.tolist()
            pieces = zip(layers, [0, *ends], ends, strict=False)
            parts = [_run(layer, x[start:end]) for layer, start, end in pieces if end > start]
            rest = x.new_zeros(len(x) - ends[-1], self._outputs())  # of no expert
            return torch.cat([*parts, rest.to(parts[0]) if parts else rest])
        if self.index is None:
            return torch.stack([_run(layer, part) for layer, part in zip(layers, x, strict=True)])
        if torch.compiler.is_exporting():
            return self._masked(layers, x, self.index)
        return self._gathered(layers, x, self.index)

    def _masked(self, layers: list[nn.Module], x: Tensor, index: Tensor) -> Tensor:
        """As `_gathered`, for graphs whose sizes must not depend on data: each expert runs on
        everything, and what is not for it becomes zero. An index may be of no expert."""
        chosen = (index == i for i in range(len(layers)))
        shape = (-1, *[1] * (x.ndim - 1))
        parts = [
            torch.where(mine.view(shape), _run(layer, x), 0)
            for layer, mine in zip(layers, chosen, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def _gathered(self, layers: list[nn.Module], x: Tensor, index: Tensor) -> Tensor:
        """Item i of x (n, rows, in) by expert index[i]: each expert runs once."""
        output: Tensor | None = None
        for expert in index.unique().tolist():
            (places,) = (index == expert).nonzero(as_tuple=True)
            part = _run(layers[expert], x[places])
            if output is None:
                output = part.new_zeros(*x.shape[:-1], part.shape[-1])
            output = output.index_copy(0, places, part)
        return x.new_zeros(*x.shape[:-1], self._outputs()) if output is None else output

    def _outputs(self) -> int:
        first: Any = next(self.weights.layers())
        return int(first.out_features)

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def __rmatmul__(self, other: Any) -> Any:
        return torch.matmul(other, self)  # type: ignore[arg-type]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        found = _product(getattr(func, "__name__", ""), args, kwargs)
        if found is not None:
            return found
        return func(*map(_tensor, args), **{key: _tensor(v) for key, v in kwargs.items()})


def _product(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The product of rows with a factor, if this call of torch is one that we carry out."""
    if len(args) < 2:
        return None
    left, right, *rest = args
    if name == "linear" and isinstance(right, Product) and isinstance(right.index, int):
        bias = kwargs.get("bias", rest[0] if rest else None)
        if right.reads_rows:
            return None
        output = right.run(left)
        return output if bias is None else output + bias
    if isinstance(right, Product) and isinstance(left, Tensor) and right.reads_rows:
        return _rows_times(name, left, right, kwargs)
    if isinstance(left, Product) and isinstance(right, Tensor) and not left.reads_rows:
        columns = name in ("bmm", "matmul") and left.ndim == right.ndim == 3
        return left.run(right.mT).mT if columns else None
    return None


def _rows_times(name: str, x: Tensor, factor: Product, kwargs: dict[str, Any]) -> Tensor | None:
    one = isinstance(factor.index, int)
    if name in ("matmul", "mm", "__matmul__") and one:
        return factor.run(x)
    if name in ("bmm", "matmul") and not one and x.ndim == 3:
        return factor.run(x)
    if name in ("_grouped_mm", "grouped_mm", "grouped_mm_fallback") and factor.index is None:
        offs, bias = kwargs.get("offs"), kwargs.get("bias")
        return None if offs is None or bias is not None or x.ndim != 2 else factor.run(x, offs)
    return None


def _tensor(value: Any) -> Any:
    return value.dense() if isinstance(value, Product) else value


def _run(layer: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = layer(x)
    return output


def _matrix(layer: nn.Module) -> Tensor:
    """The dense weight (out, in) of one layer."""
    if isinstance(layer, Form):
        return layer.dense_weight()
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        raise LowrankError(f"an expert is a {type(layer).__name__}, which has no weight")
    return weight
