"""Stock diffusers saves and loads factored models."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

import lowrank
from lowrank.errors import LowrankError
from lowrank.io.declaration import declared
from lowrank.io.diffusers_format import DiffusersConfig
from lowrank.nn import is_factored
from tests.coded import in_eight_bits, listed_by_torchao


@pytest.fixture(scope="module")
def lean() -> Any:
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    net = UNet2DModel(
        8, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8, **blocks
    )
    return lowrank.compress(net.eval(), 0.5, data=None, progress=False)[0]


def outputs(net: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return net.eval()(torch.randn(2, 3, 8, 8, generator=generator), 3).sample


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_it_comes_back_as_it_was(lean: Any, tmp_path: Path, shard: str) -> None:
    lean.save_pretrained(tmp_path / "a", max_shard_size=shard)
    assert "quantization_config" not in lean.config
    assert not hasattr(lean, "hf_quantizer")
    again = UNet2DModel.from_pretrained(tmp_path / "a")
    assert any(map(is_factored, again.modules()))
    assert torch.equal(outputs(again), outputs(lean))
    assert isinstance(again.config["quantization_config"], DiffusersConfig)
    again.to(torch.float64).to(torch.float32).save_pretrained(tmp_path / "b")
    assert torch.equal(outputs(UNet2DModel.from_pretrained(tmp_path / "b")), outputs(lean))


def test_densified_it_says_nothing_of_factors(lean: Any, tmp_path: Path) -> None:
    lean.save_pretrained(tmp_path / "a")
    dense = lowrank.to_dense(UNet2DModel.from_pretrained(tmp_path / "a"))
    dense.save_pretrained(tmp_path / "b")
    assert "lowrank" not in (tmp_path / "b" / "config.json").read_text()
    plain = UNet2DModel.from_pretrained(tmp_path / "b")
    torch.testing.assert_close(outputs(plain), outputs(lean), rtol=1e-4, atol=1e-4)


def test_an_undeclared_folder_is_refused(lean: Any, tmp_path: Path) -> None:
    """Its guards are weights of another size."""
    lean.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises((RuntimeError, ValueError), match=r"(?s)size mismatch|shape"):
        UNet2DModel.from_pretrained(tmp_path)


def test_what_another_library_quantized_is_left_to_it(lean: Any, tmp_path: Path) -> None:
    """Its quantizer saves it, as if lowrank were not there; factors beside it are refused."""
    other, quantizer = {"quant_method": "other"}, object()
    dense = lowrank.to_dense(copy.deepcopy(lean))
    dense.register_to_config(quantization_config=other)
    dense.hf_quantizer = quantizer
    with declared(dense, tmp_path):
        assert dense.hf_quantizer is quantizer
        assert dense.config["quantization_config"] == other
    both = copy.deepcopy(lean)
    both.register_to_config(quantization_config=other)
    with pytest.raises(LowrankError, match="quantized by 'other'"), declared(both, tmp_path):
        pass


def test_what_torchao_quantized_goes_into_files_of_ours(lean: Any, tmp_path: Path) -> None:
    with listed_by_torchao():
        small = in_eight_bits(copy.deepcopy(lean))
        with pytest.raises(LowrankError, match=r"diffusers' files have no place: .*lowrank\.save"):
            small.save_pretrained(tmp_path / "a")
        assert not hasattr(small, "hf_quantizer")
        lowrank.save(small, tmp_path / "b")
        skeleton = UNet2DModel.from_config(lean.config)
        assert torch.equal(outputs(lowrank.load(tmp_path / "b", skeleton)), outputs(small))


def test_an_unknown_version_is_refused(lean: Any, tmp_path: Path) -> None:
    lean.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 99'))
    with pytest.raises(LowrankError, match="format version 99 is unknown"):
        UNet2DModel.from_pretrained(tmp_path)
