"""nn.LSTM, nn.GRU and nn.RNN from linear layers, one for each of their matrices.

`ih_l0` reads the input of a layer, for all steps at once; `hh_l0` the hidden state, step by step;
`hr_l0` projects it (proj_size). The other direction's names end in "_reverse". Steps run in Python:
`lowrank.benchmark` compares it with the whole module, which runs them in one kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from .unfused import Cut, Unfused

SIZES = ("mode", "input_size", "hidden_size", "num_layers", "bias", "bidirectional", "proj_size")
State = tuple[Tensor, ...]  # hidden, and for an LSTM cell: (rows, features) each


class SplitRecurrent(Unfused, nn.RNNBase):
    """The part that does not depend on the kind of cell."""

    STATES = 1  # of a cell

    @classmethod
    def cuts(cls, module: Any) -> Mapping[str, Cut]:
        cuts = {}
        for name in (name for names in module._all_weights for name in names):
            tensor, _, key = name.partition("_")
            cuts[name] = Cut(tensor, (key,))
        return cuts

    @staticmethod
    def entered(module: Any) -> None:
        # Torch keeps lists of the parameters beside the parameters.
        module._flat_weights_names, module._flat_weights, module._flat_weight_refs = [], [], []

    @staticmethod
    def left(module: Any) -> None:
        module._flat_weights_names = [name for names in module._all_weights for name in names]
        module._init_flat_weights()

    def flatten_parameters(self) -> None:
        """Nothing: there are no parameters to lay out for a kernel."""

    def spec(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SIZES}

    def forward(self, input: Any, hx: Any = None) -> Any:  # torch's name
        """As torch's: (T, B, in), (B, T, in) with `batch_first`, (T, in), or a PackedSequence."""
        if isinstance(input, PackedSequence):
            sizes = input.batch_sizes.tolist()
            data, order, back = input.data, input.sorted_indices, input.unsorted_indices
        else:
            if input.dim() not in (2, 3) or input.shape[-1] != self.input_size:
                raise RuntimeError(
                    f"expected (…, {self.input_size}) in 2 or 3 dimensions, got "
                    f"{tuple(input.shape)}"
                )
            steps = input[:, None] if input.dim() == 2 else input
            if self.batch_first and input.dim() == 3:
                steps = steps.transpose(0, 1)
            sizes = [steps.shape[1]] * len(steps)
            data, order, back = steps.flatten(0, 1), None, None
        states = self._initial(data, sizes[0], hx, order, alone=getattr(input, "ndim", 3) == 2)
        output, states = self._run(data, sizes, states)
        if back is not None:
            states = tuple(state[:, back] for state in states)
        if isinstance(input, PackedSequence):
            return PackedSequence(output, input.batch_sizes, order, back), self._given(states)
        whole = output.unflatten(0, (len(sizes), -1))
        if input.dim() == 2:
            return whole[:, 0], self._given(tuple(state[:, 0] for state in states))
        return (whole.transpose(0, 1) if self.batch_first else whole), self._given(states)

    def _initial(
        self, data: Tensor, batch: int, hx: Any, order: Tensor | None, *, alone: bool
    ) -> State:
        """The states before the first step, each (layers · directions, B, features)."""
        lanes = self.num_layers * (1 + self.bidirectional)
        widths = (self.proj_size or self.hidden_size, self.hidden_size)[: self.STATES]
        shapes = [(lanes, batch, width) for width in widths]
        if hx is None:
            like = next(p for p in self.parameters() if p.is_floating_point())
            dtype = torch.promote_types(like.dtype, data.dtype)
            return tuple(torch.zeros(*s, dtype=dtype, device=data.device) for s in shapes)
        given: State = tuple(hx) if self.STATES > 1 else (hx,)
        given = tuple(state[:, None] for state in given) if alone else given
        for state, shape in zip(given, shapes, strict=True):
            if tuple(state.shape) != shape:
                raise RuntimeError(f"expected a state of shape {shape}, got {tuple(state.shape)}")
        return given if order is None else tuple(state[:, order] for state in given)

    def _given(self, states: State) -> Any:
        return states if self.STATES > 1 else states[0]

    def _run(self, data: Tensor, sizes: Sequence[int], states: State) -> tuple[Tensor, State]:
        """All layers over steps one after the other (rows, in), of `sizes` rows each."""
        ways = ("", "_reverse")[: 1 + self.bidirectional]
        last: list[State] = []
        for layer in range(self.num_layers):
            outputs = []
            for way in ways:
                state = tuple(s[len(last)] for s in states)
                output, state = self._direction(data, sizes, state, f"l{layer}{way}")
                outputs.append(output)
                last.append(state)
            data = torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
            if self.dropout and self.training and layer < self.num_layers - 1:
                data = F.dropout(data, self.dropout)
        return data, tuple(torch.stack(each) for each in zip(*last, strict=True))

    def _direction(
        self, data: Tensor, sizes: Sequence[int], state: State, suffix: str
    ) -> tuple[Tensor, State]:
        """One layer in one direction. Sequences that ended keep their states, and those that have
        not begun, seen from behind, have their first ones."""
        read: Any = self._modules[f"ih_{suffix}"]
        recur: Any = self._modules[f"hh_{suffix}"]
        project: Any = self._modules.get(f"hr_{suffix}")
        inputs: list[Tensor] = list(read(data).split(list(sizes)))
        outputs: list[Tensor] = [data] * len(sizes)
        steps = range(len(sizes))
        for step in reversed(steps) if suffix.endswith("_reverse") else steps:
            rows, running = sizes[step], len(state[0])
            now = state if rows == running else tuple(s[:rows] for s in state)
            new = self._cell(inputs[step], recur(now[0]), now)
            if project is not None:
                new = (project(new[0]), *new[1:])
            outputs[step] = new[0]
            if rows < running:
                rest = [s[rows:] for s in state]
                new = tuple(torch.cat([n, r.to(n)]) for n, r in zip(new, rest, strict=True))
            state = new
        return torch.cat(outputs), state

    def _cell(self, x: Tensor, h: Tensor, state: State) -> State:
        """The next state, from the products with the input and with the hidden state."""
        raise NotImplementedError


class SplitLSTM(SplitRecurrent, nn.LSTM):
    """nn.LSTM from layers: gates i, f, g, o (4H rows)."""

    WHOLE = nn.LSTM
    STATES = 2

    def _cell(self, x: Tensor, h: Tensor, state: State) -> State:
        gates = x + h
        i, f, _, o = gates.sigmoid().chunk(4, dim=-1)  # one call for all, g's unused
        g = gates.chunk(4, dim=-1)[2].tanh()
        cell = f * state[1] + i * g
        return o * cell.tanh(), cell


class SplitGRU(SplitRecurrent, nn.GRU):
    """nn.GRU from layers: gates r, z, n (3H rows); r scales the product with the hidden state."""

    WHOLE = nn.GRU

    def _cell(self, x: Tensor, h: Tensor, state: State) -> State:
        (both, n), (hidden, hn) = (t.tensor_split([2 * self.hidden_size], -1) for t in (x, h))
        r, z = (both + hidden).sigmoid().chunk(2, dim=-1)
        new = (n + r * hn).tanh()
        return (new + z * (state[0] - new),)


class SplitRNN(SplitRecurrent, nn.RNN):
    """nn.RNN from layers, with tanh or ReLU."""

    WHOLE = nn.RNN

    def _cell(self, x: Tensor, h: Tensor, state: State) -> State:
        return ((x + h).tanh() if self.mode == "RNN_TANH" else (x + h).relu(),)
