"""A quantized weight that is made as torchao makes its own, and what torchao's list says of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

FILES = "torchao.prototype.safetensors"  # torchao's package for safetensors files


class Codes(Tensor):
    """A weight in eight bits with one scale a row."""

    code: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, code: Tensor, scale: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, code.shape, dtype=scale.dtype)

    def __init__(self, code: Tensor, scale: Tensor) -> None:
        self.code, self.scale = code, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["code", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: Any) -> Codes:
        return cls(**inner)

    def dequantize(self) -> Tensor:
        return self.code * self.scale

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight, *bias = args
            return nn.functional.linear(x, weight.dequantize(), *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return type(args[0])(args[0].code, args[0].scale)
        raise NotImplementedError(func)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = nn.Parameter(type(self)(self.code.clone(), self.scale.clone()), False)
        return memo.setdefault(id(self), copied)


class Known(Codes):
    """One that torchao's list names, while `listed_by_torchao` is entered."""


Known.__module__ = "torchao.stand_in"


def in_eight_bits(model: nn.Module, cls: type[Codes] = Known) -> Any:
    """The model, of whose linear layers each weight is coded by rows; of one column it is left."""
    for layer in model.modules():
        if type(layer) is nn.Linear and layer.in_features > 1:
            weight = layer.weight.detach()
            scale = weight.abs().amax(1, keepdim=True) / 127
            held = cls((weight / scale).round().to(torch.int8), scale)
            layer.weight = nn.Parameter(held, requires_grad=False)
    return model


@contextmanager
def listed_by_torchao() -> Iterator[None]:
    """torchao's functions for safetensors, as if it were there and stored `Known`."""
    package: Any = ModuleType(FILES)
    package.safetensors_support = SimpleNamespace(
        flatten_tensor_state_dict=_flatten, unflatten_tensor_state_dict=_unflatten
    )
    package.safetensors_utils = SimpleNamespace(
        ALLOWED_CLASSES={"Known": Known, "Other": int}, ALLOWED_TENSORS_SUBCLASSES=["Known"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, FILES, package)
        yield


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    parts, notes = {}, {"tensor_names": json.dumps(list(state))}
    for name, weight in state.items():
        module, leaf = name.rsplit(".", 1)
        held = weight.__tensor_flatten__()[0]
        parts.update({f"{module}._{leaf}_{part}": getattr(weight, part) for part in held})
        dtype = {"_type": "torch.dtype", "_data": str(weight.dtype).removeprefix("torch.")}
        said = {"_type": type(weight).__name__, "_data": {"dtype": dtype, "blocks": [1, 8]}}
        notes[name] = json.dumps({**said, "_tensor_data_names": held})
    return parts, notes


def _unflatten(
    parts: dict[str, Tensor], notes: dict[str, str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    (name,) = json.loads(notes["tensor_names"])
    said, (module, leaf) = json.loads(notes[name]), name.rsplit(".", 1)
    held = {part: parts[f"{module}._{leaf}_{part}"] for part in said["_tensor_data_names"]}
    assert said["_type"] == "Known"
    assert said["_data"]["blocks"] == [1, 8]
    assert said["_data"]["dtype"]["_type"] == "torch.dtype"
    weight = Known(**held)
    assert str(weight.dtype) == f"torch.{said['_data']['dtype']['_data']}"
    return {name: weight}, {}
