"""Small nets of the modules of torch whose weights are not in layers, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WORDS, WIDTH = 60, 32


class Recurrent(nn.Module):
    """A text classifier on the mean of all states."""

    def __init__(self, cell: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.rnn = cell(WIDTH, 48, num_layers=2, bidirectional=True, batch_first=True, **options)
        self.head = nn.LazyLinear(5)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rnn(self.embedding(ids))[0].mean(1))
        return logits


class Encoder(nn.Module):
    """nn.TransformerEncoder on padded rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        states = self.encoder(self.embedding(ids), src_key_padding_mask=ids == 0)
        logits: Tensor = self.head(states)
        return logits.masked_fill((ids == 0)[..., None], 0)  # of padding anything may come out


class Translator(nn.Module):
    """nn.Transformer: an encoder, and a decoder with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.both = nn.Transformer(WIDTH, 4, 2, 2, 64, batch_first=True)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        states = self.embedding(ids)
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        logits: Tensor = self.head(self.both(states, states, tgt_mask=mask, tgt_is_causal=True))
        return logits


class UNet(nn.Module):
    """Down by a stride, a grouped convolution, and up by a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.down = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(64, 64, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(64, 32, 3, stride=2, padding=1, output_padding=1)
        self.join = nn.Conv2d(64, 32, 3, padding=1)
        self.last = nn.Conv2d(32, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        fine = self.first(image).relu()
        coarse = self.middle(self.down(fine).relu()).relu()
        both = torch.cat([fine, self.up(coarse).relu()], dim=1)
        output: Tensor = self.last(self.join(both).relu())
        return output


def _ids() -> Tensor:
    ids = torch.randint(1, WORDS, (24, 10), generator=torch.Generator().manual_seed(0))
    ids[3:6, 7:] = 0
    return ids


def _images() -> Tensor:
    return torch.randn(12, 3, 12, 12, generator=torch.Generator().manual_seed(0))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "LSTM": (lambda: Recurrent(nn.LSTM), _ids),
    "LSTM with proj_size": (lambda: Recurrent(nn.LSTM, proj_size=24), _ids),
    "GRU": (lambda: Recurrent(nn.GRU), _ids),
    "RNN": (lambda: Recurrent(nn.RNN), _ids),
    "TransformerEncoder": (Encoder, _ids),
    "Transformer": (Translator, _ids),
    "U-Net": (UNet, _images),
}


def net(name: str) -> tuple[nn.Module, Tensor]:
    """A net with random weights, in evaluation mode, and a batch for it."""
    torch.manual_seed(0)
    make, data = NETS[name]
    model, batch = make().eval(), data()
    with torch.no_grad():
        model(batch)  # lazy layers take their shapes
    return model, batch
