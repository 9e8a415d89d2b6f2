"""Which positions of a batch are real, at every module that it passes.

A batch comes with masks (rows, length); the input of a module within shows its shape alone. What is
known is known by structure: the encoder of an encoder–decoder reads the attention mask, all the
rest the decoder's, but for what the encoder gives it; a 1-d convolution maps a mask to the length
of its output; a mask that the model hands to a module of its own holds for that length. Time may
come first. Where no mask fits, all positions count, and `uncertain` names the layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..walk import layouts
from .batches import IGNORED, Batch, cut
from .running import SameTensor, first_tensor, forward, quiet, takes_hooks, tensors_in

IMAGES = "pixel_values"  # transformers' name for what has no padding
Masks = list[Tensor]  # (rows, length), bool, each of another length
Reals = dict[nn.Module, list[Tensor | None]]  # by module, call by call


def mask_of(batch: Batch | Mapping[str, Any]) -> Tensor | None:
    """The attention mask (rows, tokens), bool, if a batch has one with padding."""
    return _padded(batch.get("attention_mask"), 0) if isinstance(batch, Mapping) else None


def masks_of(
    model: nn.Module, batch: Batch | Mapping[str, Any]
) -> tuple[Tensor | None, Tensor | None]:
    """The masks (rows, length), bool, of what a model reads first and of where it predicts.

    They differ in an encoder–decoder. The decoder's is its own mask; without one, the positions
    that have a label; a decoder without an input is given the encoder's. None: no padding.
    """
    read = mask_of(batch)
    if encoder_of(model) is None or not isinstance(batch, Mapping):
        return read, read
    for name, padding in (("decoder_attention_mask", 0), ("labels", IGNORED)):
        if isinstance(batch.get(name), Tensor):
            return read, _padded(batch[name], padding)
    given = any(batch.get(f"decoder_{name}") is not None for name in ("input_ids", "inputs_embeds"))
    return read, None if given else read


def encoder_of(model: nn.Module) -> nn.Module | None:
    """The encoder of a model that is, or wraps, an encoder–decoder of transformers."""
    for module in model.modules():
        config, encoder = getattr(module, "config", None), getattr(module, "get_encoder", None)
        if getattr(config, "is_encoder_decoder", False) and callable(encoder):
            found = encoder()
            if isinstance(found, nn.Module) and found is not module:
                return found
    return None


def unsquared(model: nn.Module, batches: Sequence[Batch]) -> list[Batch]:
    """The batches, those with padding and as many rows as tokens in two: which axis of a layer's
    input is time could not be told."""
    parts: list[Batch] = []
    for batch in batches:
        masks = [mask for mask in masks_of(model, batch) if mask is not None]
        square = next((len(mask) for mask in masks if _square(mask)), 0)
        ranges = (slice(0, square - 1), slice(square - 1, square)) if square else ()
        halves = [half for rows in ranges if (half := cut(batch, rows)) is not None]
        parts += halves or [batch]
    return parts


def reals(model: nn.Module, batch: Batch) -> Reals:
    """For all modules the real positions of their inputs in one forward pass, call by call."""
    found: Reals = {}
    padding = Padding(model)

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        tensor = first_tensor((args, kwargs))
        if tensor is not None and tensor.ndim:
            found.setdefault(module, []).append(padding.real("", module, tensor))

    with padding, ExitStack() as stack:
        for module in filter(takes_hooks, model.modules()):
            stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        padding.start(batch)
        with quiet(model):
            forward(model, batch)
    return found


class Padding:
    """Hooks that follow the masks of a batch through a model.

    Attributes:
        uncertain: names of layers, in the order of their calls, that read positions of which some
            may be padding.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._encoder = model, encoder_of(model)
        # Those around the encoder are handed its mask, and predict by the decoder's.
        self._around = {
            module
            for module in model.modules()
            if self._encoder is not None and module is not self._encoder
            if any(part is self._encoder for part in module.modules())
        }
        self._read: Masks = []
        self._scopes: list[tuple[nn.Module, Masks]] = [(model, [])]  # the innermost is last
        self._crossing: list[SameTensor] = []  # what the decoder reads of the encoder
        self._square: Masks = []
        self._rows = 0  # of a batch with padding
        self._given = False
        self._handles: list[Any] = []
        self.uncertain: dict[str, None] = {}

    def start(self, batch: Batch | None) -> None:
        """The batch that is run next; None: what the model itself is called with."""
        self._given = batch is not None
        self._begin({} if batch is None else batch)

    def __enter__(self) -> Padding:
        for module in filter(takes_hooks, self._model.modules()):
            if module in (self._model, self._encoder) or module._modules:
                self._handles += [
                    module.register_forward_pre_hook(self._before, with_kwargs=True),
                    module.register_forward_hook(self._after),
                ]
            elif isinstance(module, nn.Conv1d):
                self._handles.append(module.register_forward_hook(self._mapped))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def real(self, name: str, module: nn.Module, tensor: Tensor) -> Tensor | None:
        """The positions of a layer's input that are real, bool, None for all.

        Of the input's shape without its features; for a lookup that of the ids, for a convolution
        (rows, positions of the output).
        """
        if not self._rows:
            return None
        crossing = any(same(tensor) for same in self._crossing)
        masks = self._read if crossing else self._scopes[-1][1]
        if not masks:
            return None
        kind = layouts.kind(module)
        if kind == "conv":
            found = _convolved(module, tensor, masks)
        else:
            shape = tensor.shape if kind == "embedding" else tensor.shape[:-1]
            told = [m for m in masks if all(m is not other for other in self._square)]
            found = _fitting(shape, told)
            one_a_row = shape in ((self._rows,), (self._rows, 1))
            if found is None and (one_a_row or (kind == "embedding" and len(tensor) != self._rows)):
                return None  # pooled rows, and tables of positions, have no padding
        if found is None:
            self.uncertain[name] = None
        return found

    def predicted(self, outputs: Tensor) -> Tensor | None:
        """The positions of the model's outputs (rows, …, features) that are real; None for all."""
        masks = self._scopes[0][1] if self._rows else []
        return next((mask for mask in masks if mask.shape == outputs.shape[:-1]), None)

    def _begin(self, batch: Batch | Mapping[str, Any]) -> None:
        read, predicted = masks_of(self._model, batch)
        known = [mask for mask in (read, predicted) if mask is not None]
        self._rows = len(known[0]) if known else 0
        self._read = [] if read is None else [read]
        own = [] if predicted is None else [predicted]
        self._scopes = [(self._model, self._read if predicted is read else own)]
        # Which axis of an input is time, a mask of as many rows as positions cannot tell.
        self._square = [mask for mask in known if _square(mask)]
        self._crossing = []

    def _before(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if module is self._model and not self._given:
            self._begin(next((a for a in args if isinstance(a, Mapping)), kwargs))
        if not self._rows:
            return
        mask = kwargs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) else None
        if module is self._encoder:
            self._scopes.append((module, self._read))
        elif IMAGES in kwargs and mask is None and module is not self._model:
            self._scopes.append((module, []))
        if module not in self._around and not (mask is None or mask.is_floating_point()):
            handed = _padded(mask, 0)
            if handed is not None and len(handed) == self._rows:
                self._learn(handed)
        states = kwargs.get("encoder_hidden_states")
        if isinstance(states, Tensor):
            self._crossing.append(SameTensor(states))

    def _after(self, module: nn.Module, _args: Any, output: Any) -> None:
        if not self._rows or len(self._scopes) < 2 or self._scopes[-1][0] is not module:
            return
        self._scopes.pop()
        if module is self._encoder:
            self._crossing += map(SameTensor, tensors_in(output))

    def _mapped(self, module: nn.Module, args: Any, _output: Any) -> None:
        if self._rows and args and isinstance(args[0], Tensor):
            after = _convolved(module, args[0], self._scopes[-1][1])
            if after is not None:
                self._learn(after)

    def _learn(self, mask: Tensor) -> None:
        masks = self._scopes[-1][1]
        if all(known.shape != mask.shape for known in masks):
            masks.append(mask)


def _padded(mask: Any, padding: int) -> Tensor | None:
    """Where a mask (rows, length) is not `padding`; None if that is everywhere, or it is none."""
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool((mask != padding).all()):
        return None
    return mask != padding


def _square(mask: Tensor) -> bool:
    return len(mask) == mask.shape[1] > 1


def _fitting(shape: torch.Size, masks: Masks) -> Tensor | None:
    """The mask of inputs of this shape: (rows, length, …), (rows, heads, length, …),
    (length, rows, …), or rows and length in one."""
    for mask in masks:
        if shape == (mask.numel(),):
            return mask.flatten()
        if shape[1:3] == (mask.shape[1],) * 2:
            continue  # either of the two axes may be time
        for turned, axes in ((mask, (0, 1)), (mask[:, None], (0, 2)), (mask.T, (0, 1))):
            own = tuple(shape[axis] for axis in axes if axis < len(shape))
            if own == tuple(turned.shape[axis] for axis in axes):
                more = (1,) * (len(shape) - turned.ndim)
                return turned.reshape(*turned.shape, *more).expand(shape)
    return None


def _convolved(module: nn.Module, tensor: Tensor, masks: Masks) -> Tensor | None:
    """The mask (rows, positions) of a 1-d convolution's output, if that of its input is known.

    A position is real if it were one had the row ended where its padding begins.
    """
    if not isinstance(module, nn.Conv1d) or tensor.ndim != 3:
        return None
    mask = next((m for m in masks if m.shape == (len(tensor), tensor.shape[-1])), None)
    if mask is None:
        return None
    length, reach = mask.shape[1], module.dilation[0] * (module.kernel_size[0] - 1)
    if isinstance(module.padding, str):
        around = reach if module.padding == "same" else 0
    else:
        around = 2 * module.padding[0]
    first = torch.arange((length + around - reach - 1) // module.stride[0] + 1, device=mask.device)
    first = first * module.stride[0]
    last = first + reach - around
    begin, end = mask[:, first.clamp(max=length - 1)], mask[:, last.clamp(0, length - 1)]
    return begin & end if reach >= around else begin | end
