"""Which layers are output heads: those whose outputs leave the model.

Two sources. Transformers' models name the head of their vocabulary (`get_output_embeddings`). For
all others the structure tells: a head is the last layer, and no layer of the model reads as many
features as it writes. Hidden states have a width that some layer reads, so that the last layer of a
model without a head (GPT2Model, an encoder) is none, nor is that of an autoencoder, which writes
what the first layer reads. Widths of at most `FEW` are no hidden states: an image, a regression.

The layers inside of a recurrent net or of attention are parts of one module, and no heads; those of
a transposed or grouped convolution write what the whole writes.

The rule needs no data, so that a plan has the same targets with and without. It misses a head whose
classes are by chance as many as the features of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..nn import is_factored
from ..nn.unfused import Unfused
from ..types import Site
from . import layouts
from .surgery import modules_of

CONVS = (*layouts.CONVS, *layouts.TRANSPOSED)
FEW = 4  # most channels of an image; as many features are an input or an output


def named_heads(model: nn.Module) -> set[int]:
    """Ids of the output embeddings, as transformers calls them, also of a wrapped model."""
    accessors = (getattr(module, "get_output_embeddings", None) for module in model.modules())
    return {id(accessor()) for accessor in accessors if callable(accessor)} - {id(None)}


def last_heads(model: nn.Module, sites: Sequence[Site]) -> list[Site]:
    """The last of all sites if it is a head, and the heads beside it, which read the same width."""
    read = _widths_read(model)
    split = [module for _, module in modules_of(model) if isinstance(module, Unfused)]
    whole = {id(layer): module for module in split for layer in module.layers().values()}
    heads: list[Site] = []
    for site in reversed([site for site in sites if site.kind != "embedding"]):
        layer = whole.get(id(site.module), site.module)
        if isinstance(layer, Unfused) and not isinstance(layer, CONVS):
            break
        width, features = _widths(layer)
        if width in read or (heads and features != _widths(heads[0].module)[1]):
            break
        heads.append(site)
    return heads


def _widths_read(model: nn.Module) -> set[int]:
    """The numbers of features that layers read, `FEW` aside."""
    read: set[int] = set()
    for _, module in modules_of(model):
        if layouts.kind(module) in ("linear", "conv"):
            read.add(_widths(module)[1])
        elif is_factored(module):
            read.update(getattr(module, name, 0) for name in ("in_features", "in_channels"))
        elif layouts.kind(module) is None:  # an RNN, attention: (…, in)
            matrices = (p for p in module._parameters.values() if p is not None and p.ndim > 1)
            read.update(matrix.shape[-1] for matrix in matrices)
    return {width for width in read if width > FEW}


def _widths(layer: nn.Module) -> tuple[int, int]:
    """The features that a linear layer or a convolution writes, and those that it reads."""
    if isinstance(layer, CONVS):
        return layer.out_channels, layer.in_channels
    out, features = layouts.matrix(layer).shape
    return out, features
