"""Back to dense: the same function, the class that was there, a checkpoint without lowrank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lowrank.errors import LowrankError
from lowrank.io import export, to_dense
from lowrank.nn import LowRankLinear

KINDS = ("llama", "llama-tied", "gpt2", "bert", "mixtral")


def factored(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]


@pytest.mark.parametrize("kind", KINDS)
def test_exported_model_loads_as_the_stock_class(zoo, tmp_path: Path, kind: str) -> None:
    import transformers

    model = zoo.compressed(kind)
    check = zoo.snapshot(model)
    export(model, tmp_path)
    check()
    assert not {"quantization_config", "auto_map"} & set(
        json.loads((tmp_path / "config.json").read_text())
    )
    stock = getattr(transformers, type(model).__name__)
    loaded, info = stock.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(zoo.logits(loaded), zoo.logits(model), rtol=1e-4, atol=1e-6)
    assert loaded.state_dict().keys() == zoo.make(kind).state_dict().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_to_dense_has_the_modules_of_the_dense_model(zoo, kind: str) -> None:
    original, dense = zoo.make(kind), to_dense(zoo.compressed(kind))
    for (name, old), (other, new) in zip(original.named_modules(), dense.named_modules()):  # noqa: B905
        assert (name, type(old)) == (other, type(new))
    shapes = {n: (t.shape, t.dtype) for n, t in original.state_dict().items()}
    assert {n: (t.shape, t.dtype) for n, t in dense.state_dict().items()} == shapes
    assert dense.config.to_dict() == original.config.to_dict()


def test_reloaded_gpt2_gets_its_own_layers_back(zoo, tmp_path: Path) -> None:
    """The layout survives the file, or a dense GPT-2 would hold nn.Linear and load nowhere."""
    from transformers import GPT2LMHeadModel

    model = zoo.compressed("gpt2")
    model.save_pretrained(tmp_path / "factored")
    dense = to_dense(GPT2LMHeadModel.from_pretrained(tmp_path / "factored"))
    assert [type(m) for m in dense.modules()] == [type(m) for m in zoo.make("gpt2").modules()]
    dense.save_pretrained(tmp_path / "dense")
    loaded, info = GPT2LMHeadModel.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(zoo.logits(loaded), zoo.logits(model), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_merged_weight_is_the_rounded_product(dtype: torch.dtype, layout: str) -> None:
    """Against numpy in fp64: one rounding to the stored dtype, not two."""
    from lowrank.nn import remember_layout

    generator = torch.Generator().manual_seed(0)
    down = torch.randn(300, 8, generator=generator).to(dtype)
    up = torch.randn(9, 300, generator=generator).to(dtype)
    bias = torch.randn(9, generator=generator).to(dtype)
    layer = LowRankLinear.from_factors(down, up, bias)
    remember_layout(layer, layout)
    dense = to_dense(layer)
    weight = dense.weight.T if layout == "conv1d" else dense.weight
    assert dense.weight.is_contiguous()
    assert weight.dtype == dtype
    assert torch.equal(dense.bias, bias)
    exact = torch.from_numpy(up.double().numpy() @ down.double().numpy())
    unit = {torch.float64: 1e-14, torch.float32: 2e-6}.get(dtype, torch.finfo(dtype).eps / 2 + 1e-5)
    torch.testing.assert_close(weight.double(), exact, rtol=unit, atol=unit * 10)


def test_flags_modes_and_sharing_are_kept(net: nn.Module) -> None:
    net.train()
    net.body[2].requires_grad_(False).eval()
    net.shared.up.bias.requires_grad_(False)
    x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(2))
    expected = net.eval()(x)
    net.train()
    net.body[2].eval()
    dense = to_dense(net)
    assert dense is net
    assert not factored(net)
    assert net.again is net.shared
    assert type(net.shared) is nn.Linear
    assert net.body[0].training
    assert not net.body[2].training
    assert net.body[0].weight.requires_grad
    assert not net.body[2].weight.requires_grad
    assert net.shared.weight.requires_grad
    assert not net.shared.bias.requires_grad
    assert net.body[2].bias is None
    torch.testing.assert_close(net.eval()(x), expected)


def test_copy_leaves_the_model(zoo, net: nn.Module) -> None:
    for model in (net, zoo.compressed("llama")):
        check = zoo.snapshot(model)
        dense = to_dense(model, copy=True)
        check()
        assert factored(model)
        assert not factored(dense)
        mine = {t.data_ptr() for t in model.parameters()}
        assert not mine & {t.data_ptr() for t in dense.parameters()}


def test_root_returns_a_new_layer() -> None:
    layer = LowRankLinear.from_factors(torch.randn(2, 5), torch.randn(7, 2), None).eval()
    dense = to_dense(layer)
    assert type(dense) is nn.Linear
    assert not dense.training
    assert dense.bias is None
    torch.testing.assert_close(dense.weight, layer.dense_weight())


def test_product_is_formed_in_float32_and_bias_is_copied(monkeypatch) -> None:
    seen: list[torch.dtype | None] = []
    product = LowRankLinear.dense_weight

    def spy(self: LowRankLinear, dtype: torch.dtype | None = None) -> torch.Tensor:
        seen.append(dtype)
        return product(self, dtype)

    layer = LowRankLinear.from_factors(torch.ones(2, 5), torch.ones(7, 2), torch.zeros(7)).half()
    monkeypatch.setattr(LowRankLinear, "dense_weight", spy)
    dense = to_dense(layer)
    assert seen == [torch.float32]
    assert dense.weight.dtype == layer.up.weight.dtype == torch.float16
    with torch.no_grad():
        dense.bias.fill_(1)
    assert layer.up.bias.eq(0).all()


def test_autocast_does_not_reach_the_product(net: nn.Module) -> None:
    plain = to_dense(net, copy=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = to_dense(net, copy=True)
    assert torch.equal(plain.body[0].weight, cast.body[0].weight)


def test_dense_model_is_returned_unchanged(zoo) -> None:
    model = zoo.make("llama")
    check = zoo.snapshot(model)
    assert to_dense(model) is model
    check()


def test_meta_factors_are_refused(zoo) -> None:
    model = zoo.compressed("llama")
    model.lm_head.to("meta")
    check = zoo.snapshot(model)
    with pytest.raises(LowrankError, match="cannot merge lm_head"):
        to_dense(model)
    check()


def test_generic_export_loads_strictly(zoo, net: nn.Module, tmp_path: Path) -> None:
    check = zoo.snapshot(net)
    export(net, tmp_path)
    check()
    plain = zoo.Net().eval()
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(plain(x), net(x))


def test_export_refuses_before_writing(net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(LowrankError, match="format 'gguf' is not available, only: dense, torch"):
        export(net, tmp_path / "out", "gguf")  # type: ignore[arg-type]
    for name in ("onnx", "torch.export"):
        with pytest.raises(
            LowrankError, match=f"format '{name}' traces the model: pass an input batch as example"
        ):
            export(net, tmp_path / "out", name)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(LowrankError, match="is a file, expected a folder"):
        export(net, tmp_path / "file")
    with pytest.raises(LowrankError, match="tokenizer is for transformers models, got Net"):
        export(net, tmp_path / "out", tokenizer=object())
    assert not (tmp_path / "out").exists()
