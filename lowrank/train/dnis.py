"""DNIS: which dimensions the rows of a table need, learned with the task (arXiv 2006.04466).

Rows are grouped by how often they are read, and every group b has a gate for every dimension,

    e'_i = α_b ⊙ e_i,   α = 1 at the start.

Rows learn from the training batches and gates from held-out ones, with λ‖α‖₁; both by first-order
steps in turn. After `search` steps the entries of smallest |α e| are left out, as far as the budget
asks; what stays is trained on with the gates fixed.

Against the authors' code (AutoSrh in Hetu's): whole dimensions of a group are kept or left out, by
the root of the mean square of |α e| in it, so that what is left out is not stored either: tables
become blocks of mixed dimensions, or a low-rank table where all groups keep the same. Groups double
in length from the most read rows to the least. The maps from what a block keeps to all dimensions,
at first a selection, are trained too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowrankError, listed
from ..types import Site
from ..walk import layouts
from ..walk.sites import ALL, Patterns
from .parts import distributed
from .parts.base_controller import BaseController
from .parts.gated_table import GatedTable, compacted, halving_blocks, widest
from .parts.optimizer import insert_parameters, replace_parameter


class DNIS(BaseController[nn.Module]):
    """Mixed dimensions of embeddings by gates, in the user's own loop.

    Attributes:
        history: one dict per event, with "step", "site", "event", and what was measured.
        pruned: whether the dimensions are chosen.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        ratio: float,
        search: int,
        blocks: int = 8,
        validate: Callable[[nn.Module], Tensor] | None = None,
        every: int = 1,
        lasso: float = 1e-5,
        counts: Mapping[str, Tensor] | None = None,
        target_modules: Patterns = ALL,
        exclude_modules: Patterns | None = None,
    ) -> None:
        """Put gates on the chosen embeddings, in the model and in the optimizer.

        Gates have the options of their table's group in the optimizer, weight decay included.

        Args:
            ratio: numbers kept for one of the tables', in (0, 1); maps included.
            search: steps with gates.
            blocks: groups of a table, at most.
            validate: the model, in its mode -> loss of a held-out batch, whose gradient is that of
                the gates; None: they learn from the training batches.
            every: steps between held-out batches.
            lasso: λ ≥ 0.
            counts: how often every row is read, (V,), by the name of the table; one that is not
                named has its ids in that order, most read first.

        Raises:
            LowrankError: an option is out of range, no embedding can be adapted, or `Attachment`
                refuses the model; model and optimizer are unchanged then.
        """
        if not 0 < ratio < 1:
            raise LowrankError(f"ratio is the share kept, in (0, 1), got {ratio}")
        if min(search, blocks, every) < 1 or not lasso >= 0:
            got = f"{search}, {blocks}, {every} and {lasso}"
            raise LowrankError(f"need search, blocks, every >= 1 and lasso >= 0, got {got}")
        if validate is not None and distributed.world() > 1:
            raise LowrankError(
                "held-out batches are for one process: without validate, gates learn from the "
                "training batches, whose gradients are averaged"
            )
        self.ratio, self.search, self.every, self.lasso = ratio, search, every, lasso
        self.validate, self.pruned = validate, False
        self._counts = {} if counts is None else dict(counts)
        super().__init__(
            model, optimizer, target_modules, exclude_modules, kinds=frozenset({"embedding"})
        )
        self._kept: dict[str, list[list[int]]] = {}
        for site in self.attachment.sites:
            gated = GatedTable(site.module, self._blocks(site, blocks))
            insert_parameters(optimizer, gated.rows.weight, [gated.gates])
            self.attachment.put(site, gated.train(site.module.training))
            self.layers[site.name] = gated
            widths = [gated.embedding_dim] * len(gated.gates)
            self.attachment.note("attach", site.name, rank=widths, lengths=gated.lengths)
        self.attachment.resized()

    @property
    def gates(self) -> dict[str, Tensor]:
        """α (blocks, D) of every table that has them still."""
        tables = {n: m for n, m in self.layers.items() if isinstance(m, GatedTable)}
        return {name: table.gates.detach().clone() for name, table in tables.items()}

    @property
    def ranks(self) -> dict[str, list[int]]:
        """How many dimensions every group keeps; before the choice all."""
        whole = {
            name: [layer.embedding_dim] * len(layer.gates)
            for name, layer in self.layers.items()
            if isinstance(layer, GatedTable)
        }
        return whole | {name: [len(block) for block in kept] for name, kept in self._kept.items()}

    def check_sites(self) -> None:
        names = {site.name: site for site in self.attachment.sites}
        unknown = sorted(set(self._counts) - set(names))
        if unknown:
            raise LowrankError(f"counts of {listed(unknown, 3)}, which are no tables here")
        for name, site in names.items():
            rows = site.shape[0]
            if name in self._counts and self._counts[name].shape != (rows,):
                got = tuple(self._counts[name].shape)
                raise LowrankError(f"counts of {name} must be ({rows},), got {got}")
            padding = site.module.padding_idx
            if padding is None or isinstance(site.module, nn.EmbeddingBag):
                continue
            if bool(layouts.matrix(site.module)[padding].detach().any()):  # type: ignore[index]
                raise LowrankError(
                    f"row {padding} of {name} is its padding_idx and not zero, which gates cannot "
                    f"keep: set it to zero, or exclude it (exclude_modules=[{name!r}])"
                )

    def _blocks(self, site: Site, blocks: int) -> Tensor:
        """The group of every id."""
        places = halving_blocks(site.shape[0], blocks).to(layouts.matrix(site.module).device)
        if site.name not in self._counts:
            return places
        counts = self._counts[site.name].to(places.device)
        order = counts.argsort(descending=True, stable=True)
        return torch.empty_like(places).scatter(0, order, places)

    def gradients(self) -> dict[str, Tensor | None]:
        found = super().gradients()
        return {n: g._values() if g is not None and g.is_sparse else g for n, g in found.items()}

    def on_gradients(self) -> None:
        tables = [layer for layer in self.layers.values() if isinstance(layer, GatedTable)]
        if self.pruned or not tables:
            return
        gates, scale = [table.gates for table in tables], self.attachment.loss_scale()
        if self.validate is not None:
            self._held_out(gates, scale)
        for gate in gates:
            if gate.grad is not None:
                gate.grad.add_(gate.sign(), alpha=self.lasso * scale)

    def _held_out(self, gates: list[nn.Parameter], scale: float) -> None:
        """The gates' gradients are those of a held-out batch, or none in this step."""
        slopes: Any = [None] * len(gates)
        if self.validate is not None and self.attachment.step % self.every == 0:
            with torch.enable_grad():
                loss = self.validate(self.attachment.root)
                slopes = torch.autograd.grad(loss, gates, allow_unused=True)
        for gate, slope in zip(gates, slopes, strict=True):
            gate.grad = None if slope is None else slope * scale

    def on_step(self) -> None:
        if not self.pruned and self.attachment.step == self.search:
            self._prune()

    def on_finish(self) -> None:
        if not self.pruned:
            self._prune()

    def _prune(self) -> None:
        """Choose the dimensions of all tables within the budget."""
        tables = {n: m for n, m in self.layers.items() if isinstance(m, GatedTable)}
        whole = sum(table.rows.weight.numel() for table in tables.values())
        sizes = {name: table.sizes() for name, table in tables.items()}
        lengths = {name: table.lengths for name, table in tables.items()}
        kept = widest(sizes, lengths, int(self.ratio * whole))
        for name, mask in kept.items():
            chosen = [row.nonzero().flatten().tolist() for row in mask]
            self._compact(name, chosen)
            kind, widths = type(self.layers[name]).__name__, [len(block) for block in chosen]
            self.attachment.note("prune", name, rank=widths, lengths=lengths[name], kind=kind)
        self.pruned = True
        self.attachment.resized()

    def _compact(self, name: str, chosen: list[list[int]]) -> None:
        """Put the table of these dimensions in place of the gated one; the optimizer starts it
        without a state."""
        old = self.layers[name]
        assert isinstance(old, GatedTable)
        kept = torch.zeros_like(old.gates, dtype=torch.bool)
        for block, dimensions in enumerate(chosen):
            kept[block, dimensions] = True
        new = compacted(old, kept)
        replace_parameter(self.attachment.optimizer, old.gates, [])
        replace_parameter(self.attachment.optimizer, old.rows.weight, new.parameters())
        self.attachment.set(name, new)
        self.attachment.claim(name, new, "embedding")
        self.layers[name], self._kept[name] = new, chosen

    def size_of(self, layer: nn.Module) -> Any:
        name = next(name for name, own in self.layers.items() if own is layer)
        return self._kept.get(name)

    def check_state(self, state: dict[str, Any]) -> None:
        if self.pruned and not state["policy"]["pruned"]:
            raise LowrankError(
                "the dimensions are not chosen in this state, but here they are: build DNIS on a "
                "fresh model, as when the run began"
            )

    def resize(self, site: Site, size: Any) -> None:
        if size is not None and site.name not in self._kept:
            self._compact(site.name, size)

    def progress(self) -> dict[str, Any]:
        return {"policy": {"pruned": self.pruned}}

    def resume(self, state: dict[str, Any]) -> None:
        self.pruned = state["policy"]["pruned"]
