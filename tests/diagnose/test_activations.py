"""features: what layers read, against numpy on inputs taken by a hook; what it did not measure."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import lowrank
from lowrank import LowrankError, linalg
from lowrank.diagnose import features
from tests.zoo import inputs_of, make, mlp, said, tokens, unchanged

X = torch.randn(200, 24, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def ranks(rows: np.ndarray) -> list[float]:
    """Effective rank, the same of singular values, and stable rank, of centred rows."""
    values = np.linalg.svd(rows - rows.mean(0))[1]
    found = []
    for weights in (values**2, values):
        p = weights[weights > 1e-12 * weights[0]] / weights.sum()
        found.append(float(np.exp(-(p * np.log(p)).sum())))
    return [*found, float((values**2).sum() / values[0] ** 2)]


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.Flatten(),
                         nn.Linear(64, 2))  # fmt: skip


def test_figures_are_those_of_what_the_layer_reads() -> None:
    model = mlp(24, 16, 8)
    rows = inputs_of(model, ["2"], lambda: model(X))["2"]
    with unchanged(model):
        found = features(model, list(X.split(64)), progress=False)
    site = found["2"]
    assert site.spectrum is not None
    s = site.spectrum
    assert [s.effective_rank, s.entropy_rank, s.stable_rank] == pytest.approx(ranks(rows), rel=1e-4)
    assert (site.width, site.positions, found.rows_read) == (16, 200, 200)
    assert site.zeros == pytest.approx((rows == 0).mean())
    rms = np.sqrt((rows**2).mean(1, keepdims=True))
    assert site.near == pytest.approx((np.abs(rows) <= rms / 100).mean())
    assert 0.3 < site.zeros < site.near
    assert found["0"].zeros == 0


def test_channels_are_the_features_of_a_convolution() -> None:
    net = convolutions()
    read = torch.relu(net[0](IMAGES)).detach()
    found = features(net, IMAGES, labels=[0, 1, 2] * 2, progress=False)
    site = found["2"]
    rows = read.movedim(1, -1).reshape(-1, 5).numpy()
    assert site.spectrum is not None
    assert site.spectrum.effective_rank == pytest.approx(ranks(rows)[0], rel=1e-4)
    assert (site.width, site.positions) == (5, 6 * 36)
    assert site.collapse == pytest.approx(
        linalg.neural_collapse(read.mean((2, 3)), torch.tensor([0, 1, 2] * 2)), rel=1e-5
    )
    assert found["4"].collapse is not None  # of vectors


def test_padding_counts_for_nothing() -> None:
    model, short = make("classifier"), tokens(6, 9)
    wide = torch.cat([short, torch.full((6, 4), 3)], 1)
    mask = (torch.arange(13) < 9).long().repeat(6, 1)
    labels, name = [0, 0, 1, 1, 2, 2], "bert.encoder.layer.1.output.dense"
    bare = features(model, short, labels=labels, progress=False)[name]
    batch = {"input_ids": wide, "attention_mask": mask}
    padded = features(model, batch, labels=labels, progress=False)[name]
    assert padded.positions == bare.positions == 54
    assert padded.spectrum is not None
    assert padded.spectrum.values.tolist() == pytest.approx(
        bare.spectrum.values.tolist(),
        rel=1e-3,
        abs=1e-6,  # type: ignore[union-attr]
    )
    assert padded.collapse == pytest.approx(bare.collapse, rel=1e-3)


def test_compressed_layers_are_read_too() -> None:
    net = convolutions()
    small, _ = lowrank.compress(net, rank=2, target_modules=["2", "4"], copy=True, progress=False)
    want = features(net, IMAGES, progress=False)
    found = features(small, IMAGES, progress=False)
    assert [site.name for site in found.sites] == [site.name for site in want.sites]
    # The first factored layer reads what it read before.
    assert found["2"].spectrum.values.tolist() == want["2"].spectrum.values.tolist()  # type: ignore[union-attr]


def test_it_prints_and_serialises() -> None:
    net = mlp(24, 8, 8, 3)
    found = features(net, list(X.split(50)), labels=torch.arange(200) % 3, probes=4, progress=False)
    body = json.loads(found.to_json())
    assert [site["site"] for site in body["sites"]] == ["0", "2", "4"]
    assert body["sites"][1]["spectrum"]["effective_rank"] == found["2"].spectrum.effective_rank  # type: ignore[union-attr]
    assert body["sites"][1]["collapse"]["within"] == found["2"].collapse.within  # type: ignore[union-attr]
    row = found.rows()[1]
    assert found.rows()[0]["local 0.01"] == "≥4"
    assert row["zero"] == f"{100 * found['2'].zeros:.0f} %"
    text = str(found)
    assert "200 rows of data" in text
    assert "NC2 angles" in text
    assert "dropped" not in text
    bare = features(net, X, progress=False)
    assert "NC1" not in str(bare)
    assert "local" not in str(bare)


def test_layers_without_figures_say_why() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(24, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    found = features(Half(), X, progress=False)
    assert (found["idle"].reason, found["idle"].spectrum) == ("the data did not reach it", None)
    json.loads(found.to_json())
    only = features(Half(), X, target_modules=["used"], progress=False)
    assert [site.name for site in only.sites] == ["used"]


def test_what_does_not_fit_is_refused() -> None:
    net = mlp(24, 8, 3)
    with pytest.raises(LowrankError) as caught:
        features(net, X, labels=[0, 1], progress=False)
    assert "one integer for each of the 200 rows of the data, got torch.int64" in said(caught)
    for options, words in (
        ({"labels": torch.rand(200)}, "one integer for each"),
        ({"loss": 0.0}, "loss must be positive, got 0.0"),
        ({"probes": -1}, "probes must be at least 0, got -1"),
        ({"target_modules": ["absent"]}, "'absent' matches none"),
    ):
        with pytest.raises(LowrankError, match=words):
            features(net, X, progress=False, **options)  # type: ignore[arg-type]
    with pytest.raises(LowrankError, match="features need batches"):
        features(net, lambda model: model(X), progress=False)
    with pytest.raises(LowrankError, match="features are of data"):
        features(net, None, progress=False)  # type: ignore[arg-type]
