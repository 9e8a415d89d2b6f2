"""Digests of models and data, and atomic writes of files."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowrankError
from .batches import Batch, as_dense


def model_print(model: nn.Module) -> str:
    """Digest of all tensors of the state dict, with names, shapes and dtypes."""
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            add_tensor(digest, name, tensor)
    return digest.hexdigest()


def data_print(batches: Iterable[Batch]) -> str:
    """Digest of batches."""
    digest = hashlib.sha256()
    for index, batch in enumerate(batches):
        items: Mapping[str, Any] = batch if isinstance(batch, Mapping) else {"": batch}
        for name, value in sorted(items.items()):
            if isinstance(value, Tensor):
                add_tensor(digest, f"{index} {name}", value)
            else:
                digest.update(f"{index} {name} {value!r}".encode())
    return digest.hexdigest()


def write_whole(path: Path, about: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file with its metadata atomically: a reader sees all of it or nothing."""
    from safetensors.torch import save

    data = save(dict(tensors), metadata=dict(about))
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(data)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def check_place(path: Path) -> None:
    """Raises LowrankError if there is no folder to write the file to."""
    if not path.parent.is_dir():
        raise LowrankError(f"the cache {path} cannot be written: there is no folder {path.parent}")


def add_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    """Add name, shape, dtype and bytes of a tensor to a digest of hashlib."""
    whole = as_dense(tensor.detach())
    digest.update(f"{name} {tuple(whole.shape)} {whole.dtype}".encode())
    flat = whole.cpu().contiguous().flatten()
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)
