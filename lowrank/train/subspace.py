"""Training in a random subspace: θ = θ₀ + λ · (P z), and only z is trained.

P is a projection drawn from a seed (`linalg.projections`), so that a trained network is the seed
and the vector z. Three uses of one controller:

- intrinsic dimension (Li et al., arXiv 1804.08838): how few coordinates solve a task; see
  `intrinsic_dimension`;
- SAID (Aghajanyan et al., arXiv 2012.13255): a scale λ for each tensor is trained too, and counts;
- PRANC (Nooralinejad et al., arXiv 2206.08464): `projection="kaiming", start="seed"`, a network as
  a file of kilobytes. Their bases come from torch's generator on the GPU, and a checkpoint does not
  outlive a change of torch; ours from a counter. Their code cuts the draws of the classifier into
  other chunks forwards than backwards; here one object gives P z and Pᵀ g.

The gradients of the parameters are turned into one of z after backward, and are then None, so that
the optimizer passes over the parameters; it steps z.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import LowrankError
from ..io import seeded
from ..io.seeded import Seeded
from ..walk.checks import check_module
from ..walk.surgery import unwrapped
from .parts import distributed, wrappers
from .parts.attachment import refuse_not_finite

Kind = Literal["dense", "sparse", "fastfood", "kaiming"]
PRECISIONS = {"float32": torch.float32, "float16": torch.float16}


class Subspace:
    """A controller that trains few coordinates in place of the parameters.

    Attributes:
        coordinates: z (dimension,), a parameter in the optimizer.
        scales: λ (tensors,) with `said`, else None.
        size: number of parameters that z stands for.
        history: empty: no rank changes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        dimension: int,
        projection: Kind = "dense",
        start: Literal["model", "seed"] = "model",
        said: bool = False,
        norms: Literal["kept", "projected"] = "kept",
        precision: Literal["float32", "float16"] = "float32",
        rate: float | None = None,
        seed: int = 0,
    ) -> None:
        """
        Args:
            dimension: trained numbers in place of the parameters, scales included.
            projection: "dense": size · dimension operations a step, and as many numbers in memory,
                which are drawn anew each step, slowly, if they take more than 2 GiB; "sparse":
                √size · dimension of both; "fastfood": size · log(size) operations, size numbers;
                "kaiming": dense, in the bounds of torch's own initialisation of each layer.
            start: "model": θ₀ is what the model is now, and whoever loads the vector needs it;
                "seed": θ₀ is drawn, and replaces the parameters now.
            said: train a scale of each tensor.
            norms: "kept": parameters of layers without a matrix are trained by the optimizer as
                before, and stored; "projected": they are in the subspace.
            precision: of z as `seeded` and `finish` round it.
            rate: learning rate of z; None: the optimizer's.
            seed: of P, and of θ₀.

        Raises:
            LowrankError: an option is out of range, or there is nothing to train; nothing is
                changed then.
        """
        check_module(model)
        _check_options(projection, start, norms, precision)
        distributed.refuse_sharded(model, optimizer, type(self).__name__)
        self._inner = wrappers.inner_optimizer(optimizer)
        self.root, self.optimizer = unwrapped(model), optimizer
        self._flat = seeded.flat_of(self.root, norms)
        number = _number_of(self._flat)
        tensors = len(self._flat.parameters) if said else 0
        if said and dimension <= tensors:
            raise LowrankError(f"dimension must be above {tensors}, the number of scales, got "
                               f"{dimension}")  # fmt: skip
        self._random = seeded.projection_of(projection, dimension - tensors, seed, self._flat)
        self.dimension, self.size = dimension, len(self._flat.bounds)
        self.seed, self.projection, self.start, self.norms = seed, projection, start, norms
        self.precision, self.step = precision, 0
        self.history: list[dict[str, Any]] = []
        self._origin = seeded.digest_of(self._flat) if start == "model" else ""
        exact = self._flat.values() if start == "model" else seeded.starting_point(seed, self._flat)
        self._exact, self._start = exact, exact.to(number)
        self._counts = self._flat.counts.to(number.device)
        self.coordinates = nn.Parameter(number.new_zeros(dimension - tensors))
        self.scales = nn.Parameter(number.new_ones(tensors)) if said else None
        scales = [] if self.scales is None else [self.scales]
        self._trained = [self.coordinates, *scales]
        group = {"params": self._trained, **({} if rate is None else {"lr": rate})}
        self._inner.add_param_group(group)
        self._write()

    @torch.no_grad()
    def before_step(self) -> None:
        """After backward: the gradients of the parameters become one of z.

        Raises:
            LowrankError: there is no gradient, or it is not finite; nothing was changed.
        """
        if not wrappers.synchronises(self.optimizer):
            return
        found = {name: p.grad for name, p in self._flat.parameters.items()}
        if all(gradient is None for gradient in found.values()):
            raise LowrankError("Subspace.before_step found no gradient: call it after backward()")
        if not wrappers.is_scaled(self.optimizer):  # a scaler skips such a step
            refuse_not_finite(found)
        flat = torch.cat([
            (p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten()).to(self._start)
            for p in self._flat.parameters.values()
        ])  # fmt: skip
        if self.scales is not None:
            products = flat * self._random.times(self.coordinates.detach())
            self.scales.grad = torch.stack([
                part.sum() for part in products.split(self._counts.tolist())
            ])  # fmt: skip
            flat = flat * self._spread()
        self.coordinates.grad = self._random.transposed(flat)
        for parameter in self._flat.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def after_step(self) -> None:
        """After `optimizer.step()`: the parameters follow z."""
        if wrappers.synchronises(self.optimizer) and not wrappers.skipped_step(self.optimizer):
            self.step += 1
            self._write()

    def end_epoch(self) -> None:
        """Nothing happens by epochs."""

    @torch.no_grad()
    def seeded(self) -> Seeded:
        """What the network is now computed from, to be saved: seed, z, and what is kept."""
        rounded = self.coordinates.detach().to("cpu", PRECISIONS[self.precision], copy=True)
        refuse_not_finite({"coordinates": rounded}, f"rounded to {self.precision}, z")
        scales = None
        if self.scales is not None:
            scales = self.scales.detach().to("cpu", torch.float32, copy=True)
        return Seeded(
            self.seed, self.projection, self.start, self.norms, rounded,
            scales,
            seeded.kept_of(self.root, self._flat), self._flat.digest(), self._origin,
        )  # fmt: skip

    @torch.no_grad()
    def finish(self) -> nn.Module:
        """The model with the weights that `seeded` stands for, bit for bit; z leaves the optimizer.

        Save `seeded()` before or after: what it rounds to is the same.
        """
        self._flat.write(self.seeded().values(self._flat, self._exact))
        return self._close()

    def detach(self) -> None:
        """Stop: the parameters stay as they are, and the optimizer trains all of them."""
        self._close()

    def rebind(self, optimizer: Any) -> None:
        """A trainer has wrapped the optimizer.

        Raises:
            LowrankError: the optimizer is another one.
        """
        if wrappers.inner_optimizer(optimizer) is not self._inner:
            raise LowrankError("Subspace was built with another optimizer than the trainer's")
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """JSON. Load it before the optimizer's state."""
        return {
            "controller": type(self).__name__, "step": self.step, **self._about(),
            "coordinates": self.coordinates.tolist(),
            "scales": None if self.scales is None else self.scales.tolist(),
        }  # fmt: skip

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a run was saved; the parameters follow.

        Raises:
            LowrankError: it is of another subspace; nothing is changed then.
        """
        own = {"controller": type(self).__name__, **self._about()}
        differ = [key for key, value in own.items() if state.get(key) != value]
        if differ:
            raise LowrankError(
                f"this state is of another subspace: {differ[0]} is {state.get(differ[0])!r}, "
                f"expected {own[differ[0]]!r}"
            )
        self.coordinates.copy_(torch.tensor(state["coordinates"], dtype=torch.float64))
        if self.scales is not None:
            self.scales.copy_(torch.tensor(state["scales"], dtype=torch.float64))
        self.step = state["step"]
        self._write()

    def _about(self) -> dict[str, Any]:
        return {
            "seed": self.seed, "projection": self.projection, "dimension": self.dimension,
            "said": self.scales is not None, "start": self.start, "layout": self._flat.digest(),
            "origin": self._origin,
        }  # fmt: skip

    def _spread(self) -> Tensor:
        """λ of every parameter."""
        assert self.scales is not None
        return self.scales.detach().repeat_interleave(self._counts)

    @torch.no_grad()
    def _write(self) -> None:
        moved = self._random.times(self.coordinates.detach())
        if self.scales is not None:
            moved = moved * self._spread()
        self._flat.write(self._start + moved)

    def _close(self) -> nn.Module:
        # Found by z: loading a state puts other dicts in the optimizer's list.
        groups = self._inner.param_groups
        groups[:] = [g for g in groups if all(p is not self.coordinates for p in g["params"])]
        for parameter in self._trained:
            self._inner.state.pop(parameter, None)
        return self.root


def _check_options(projection: str, start: str, norms: str, precision: str) -> None:
    seeded.check_choices(projection, start, norms)
    if precision not in PRECISIONS:
        raise LowrankError(f"precision must be one of {[*PRECISIONS]}, got {precision!r}")
    if (start, norms) == ("seed", "projected"):
        raise LowrankError('a norm cannot be drawn: start="seed" needs norms="kept"')


def _number_of(flat: seeded.Flat) -> Tensor:
    """A tensor on the device of the parameters: float64 if one of them is, else float32."""
    every = list(flat.parameters.values())
    wide = any(parameter.dtype == torch.float64 for parameter in every)
    return torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=every[0].device)
