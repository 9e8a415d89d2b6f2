"""The optimizer of recovery: orthogonalised steps for matrices, AdamW for vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .lrc import MasterWeights

MUON, ADAMW = OPTIMIZERS = ("muon", "adamw")
MATCHED = 0.2  # RMS of torch's Muon step at a rate of 1, with match_rms_adamw
LEAST = 1e-4  # RMS that a rate is relative to


class RecoveryOptimizer:
    """Muon (Jordan et al. 2024; RMS of its steps: arXiv 2502.16982, eq. 4) for the factors, in
    which all directions of a step are equally long: those of small singular values, which a cut
    has weakened, learn as fast as the others. AdamW for vectors and for batches of matrices.

    Parameters of 16 bits are trained in float32 copies (`MasterWeights`). The kernel of a
    convolution is a matrix (out, in · kernel).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], rate: float, kind: str = MUON) -> None:
        """
        Args:
            parameters: those to train; their gradients are read from `grad`.
            rate: RMS of a step, relative to each parameter's own.
            kind: one of OPTIMIZERS: "adamw" is for all parameters.
        """
        self._matrices: list[tuple[nn.Parameter, Tensor]] = []
        matrices: list[dict[str, object]] = []
        others: list[dict[str, object]] = []
        for parameter in parameters:
            length = rate * max(float(parameter.detach().float().square().mean().sqrt()), LEAST)
            matrix = _matrix(parameter) if kind == MUON else None
            if matrix is None:
                others.append({"params": [parameter], "lr": length})
            else:
                self._matrices.append((parameter, matrix))
                matrices.append({"params": [matrix], "lr": length / MATCHED})
        self._optimizers: list[MasterWeights] = []
        if matrices:
            options = {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
            self._optimizers.append(MasterWeights(matrices, torch.optim.Muon, lr=1.0, **options))
        if others:
            self._optimizers.append(MasterWeights(others, torch.optim.AdamW, lr=1.0))
        self._groups = [group for made in self._optimizers for group in made.param_groups]
        self._rates = [group["lr"] for group in self._groups]

    def step(self, share: float) -> None:
        """One step, at this share of the rate."""
        for group, rate in zip(self._groups, self._rates, strict=True):
            group["lr"] = share * rate
        for parameter, matrix in self._matrices:
            matrix.grad = None if parameter.grad is None else parameter.grad.reshape(matrix.shape)
        for optimizer in self._optimizers:
            optimizer.step()


def _matrix(parameter: nn.Parameter) -> Tensor | None:
    """The parameter's memory as a matrix, or None if it is none."""
    if parameter.ndim == 3 or parameter.ndim < 2 or not parameter.is_contiguous():
        return None  # of three axes: the factors of a layer's experts
    return parameter.detach().view(len(parameter), -1)
