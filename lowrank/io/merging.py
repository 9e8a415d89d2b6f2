"""Merge factored modules back into dense layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import LowrankError, listed
from ..nn import Form, LowRankEmbedding, RoutedMLP, TiedHead, build, describe
from ..nn.factored_conv import FactoredConv
from ..nn.table_form import TableForm
from ..walk import layouts
from ..walk.parts import join_parts
from ..walk.surgery import factored, swap
from .flattening import is_known


def densify(model: nn.Module, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every factored module by a dense layer; returns the model, or the new root.

    Weights that torchao quantized become numbers, in other layers too. Shared modules stay shared.
    Products are computed in float32 or better and stored in `dtype`, by default the dtype of the
    factors.

    Raises:
        LowrankError: factors are on the meta device (offloaded, or never loaded), carry something
            else such as an adapter, or are not a linear map.
    """
    modules = factored(model)
    empty = [name or "(root)" for name, module in modules.items() if _is_meta(module)]
    if empty:
        raise LowrankError(
            f"cannot merge {listed(empty)}: the weights are on the meta device; load the model "
            f"without offloading"
        )
    for name, module in modules.items():
        if module.not_linear:
            raise LowrankError(f"{name or '(root)'} cannot be merged: {module.not_linear}")
        _check_plain(module, name or "(root)")
    distinct = {id(module): module for module in modules.values()}
    tables = {key: t for key, m in distinct.items() if (t := _table_of(m)) is not None}
    whole = {**distinct, **{id(table): table for table in tables.values()}}
    plain = {key: _dense(m, dtype) for key, m in whole.items() if key not in tables}
    readers = {key: _reader(distinct[key], t, plain[id(t)]) for key, t in tables.items()}
    root = swap(model, {**plain, **readers})
    join_parts(root)
    _dequantize(root, dtype)
    return root


def _dequantize(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Give numbers to the layers whose weights torchao quantized, in place."""
    plain: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and is_known(weight):
                if id(weight) not in plain:
                    numbers: Tensor = weight.dequantize().to(dtype or weight.dtype)
                    plain[id(weight)] = nn.Parameter(numbers, requires_grad=False)
                module._parameters[name] = plain[id(weight)]


def _table_of(module: Form) -> LowRankEmbedding | None:
    """The factored embedding that a module shares, or None."""
    return module.owner if isinstance(module.owner, LowRankEmbedding) else None


def _reader(module: Form, factors: LowRankEmbedding, table: nn.Module) -> nn.Module:
    """A dense head or second embedding, tied to the weight (V, D) of `table`."""
    weight: nn.Parameter = table.weight  # type: ignore[assignment]
    if isinstance(module, TiedHead):
        rows, columns = weight.shape
        dense: nn.Module = nn.Linear(columns, rows, bias=False, device="meta")
        bias = module.bias
        if bias is not None and bias.dtype != weight.dtype:
            bias = nn.Parameter(bias.detach().to(weight.dtype), bias.requires_grad)
        dense.bias = bias  # type: ignore[assignment] # the same object, which others may share
        dense.weight = weight
    else:
        dense = factors.dense(weight)
    return dense.train(module.training)


def _dense(module: Form, dtype: torch.dtype | None) -> nn.Module:
    """The dense layer of a form: nn.Linear, transformers' Conv1D, a convolution or an embedding; of
    an MLP in experts the module that it was."""
    if isinstance(module, RoutedMLP):
        return module.whole()
    holder = _holder(module)
    stored = next(p.dtype for p in holder.parameters() if p.dtype.is_floating_point)
    weight = _weight(module, stored).to(dtype or stored)  # (out, in)
    bias = layouts.bias(module)
    dense: nn.Module
    if isinstance(module, TableForm):
        dense = module.dense(nn.Parameter(weight))
    elif isinstance(module, FactoredConv):
        dense = module.geometry.dense(weight, bias)
    elif module.layout == "conv1d":
        dense = _conv1d(weight, bias)
    else:
        out_features, in_features = weight.shape
        dense = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
        dense.weight = nn.Parameter(weight)
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach().to(weight.dtype, copy=True), bias.requires_grad)
    factors = [p for name, p in holder.named_parameters() if not name.endswith("bias")]
    dense.weight.requires_grad_(any(p.requires_grad for p in factors))
    return dense.train(module.training)


def _holder(module: Form) -> nn.Module:
    """The module that stores the numbers of a form: itself, or the owner that it reads."""
    holds = next(module.parameters(), None) is not None
    return module if holds or module.owner is None else module.owner


def _weight(module: Form, stored: torch.dtype) -> Tensor:
    """The dense weight (out, in), computed in float32 or better."""
    device = next(_holder(module).parameters()).device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        wide = torch.promote_types(stored, torch.float32)
        weight = module.dense_weight(wide)
    return weight.detach().contiguous()


def _conv1d(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """transformers' Conv1D, which stores (in, out) and always has a bias."""
    from transformers.pytorch_utils import Conv1D

    out_features, in_features = weight.shape
    with torch.device("meta"):
        dense: nn.Module = Conv1D(out_features, in_features)
    dense.weight = nn.Parameter(weight.T.contiguous())
    if bias is None:
        dense.bias = nn.Parameter(weight.new_zeros(out_features))
    return dense


def _check_plain(module: Form, where: str) -> None:
    """Raises LowrankError if merging would silently drop what peft or others added."""
    held, plain = module.state_dict(), build(describe(module), where).state_dict()
    extra = set(held) - set(plain)
    if extra:
        raise LowrankError(
            f"{where} holds more than its factors: {listed(sorted(extra))}; merge or remove "
            f"adapters first (peft: model.merge_and_unload()); what is quantized has to be merged "
            f"before it is quantized"
        )
    codes = [
        f"{key} {held[key].dtype}"
        for key, empty in plain.items()
        if key in held and empty.is_floating_point() and not _is_number(held[key])
    ]
    if codes:
        raise LowrankError(
            f"{where} holds codes instead of numbers: {listed(codes)}; merge it before quantizing"
        )


def _is_number(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1


def _is_meta(module: nn.Module) -> bool:
    return any(p.is_meta for p in module.parameters())
