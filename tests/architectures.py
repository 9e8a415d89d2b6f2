"""Every effort on tiny random models of many architectures: `make architectures`.

A family of transformers is made small by the names of its config's entries, diffusers' and plain
torch's are written out below. Each is compressed without data, whitened and with effort="fast",
loaded in a new process, merged back, and compressed in bfloat16. A cell is "yes", or one reason:
the sentence of a LowrankError. Anything else is a fault. The table goes to
`benchmarks/results/architectures.json` and `docs/architectures.md`; `tests/test_architectures.py`
runs a tenth of it.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowrank
from lowrank import LowrankError
from lowrank.calibration.running import tensors_in
from tests.limits import TooLong, limited

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/architectures.json"
PAGE = ROOT / "docs/architectures.md"
CELLS = ("data-free", "whitened", "fast", "reload", "densified", "bf16")
RATIO = 0.6
LARGEST = 400_000  # parameters: families that do not get smaller by these names are left out
SECONDS = 120  # for one family
VOCABULARY, WIDTH, HEIGHT = 96, 32, 32

# What a config entry of such a name becomes, wherever it stands.
SMALL: dict[int, str] = {
    WIDTH: "hidden_size d_model n_embd dim embed_dim word_embed_proj_dim decoder_hidden_size"
    " emb_dim model_dim attention_hidden_size embedding_size d_embed projection_dim"
    " encoder_hidden_size fusion_hidden_size hidden_dim feature_size mask_feature_size lru_width"
    " out_hidden_size"
    " decoder_dim embed_size image_size img_size hidden_channels mlp_hidden_size",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_blocks"
    " num_encoder_layers num_decoder_layers encoder_num_layers decoder_num_layers depth layers"
    " decoder_num_hidden_layers encoder_num_hidden_layers l_layers x_layers r_layers"
    " num_key_value_heads num_kv_heads n_kv_heads multi_query_group_num n_groups"
    " num_experts_per_tok moe_topk moe_k moe_top_k num_experts_per_token router_top_k",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads attention_heads"
    " decoder_attention_heads encoder_num_attention_heads decoder_num_attention_heads"
    " num_experts num_local_experts n_routed_experts moe_num_experts",
    8: "head_dim d_kv attention_head_dim qk_nope_head_dim v_head_dim qk_rope_head_dim kv_channels"
    " d_head swa_head_dim linear_key_head_dim linear_value_head_dim state_size ssm_state_size"
    " patch_size num_queries",
    48: "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner dim_feedforward"
    " encoder_intermediate_size decoder_intermediate_size mlp_dim ffn_hidden_size",
    24: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size",
    1: "n_shared_experts num_shared_experts first_k_dense_replace n_group topk_group eos_token_id",
    0: "pad_token_id bos_token_id",
    VOCABULARY: "vocab_size text_vocab_size entity_vocab_size vocab_size_per_layer_input",
    64: "max_position_embeddings n_positions n_ctx max_sequence_length max_target_positions"
    " max_source_positions max_seq_len context_length seq_length",
    16: "q_lora_rank kv_lora_rank num_mel_bins sliding_window local_attention_window",
    5: "num_labels",
}
SIZES = {name: size for size, names in SMALL.items() for name in names.split()}
WIDTHS = {"hidden_sizes", "embed_dims", "dims", "encoder_hidden_sizes", "embedding_dims"}
# Where the names are not enough: entries that a config checks against each other.
LINEAR = ["linear_attention", "full_attention"]
OWN: dict[str, dict[str, Any]] = {
    "axk1": {"num_key_value_heads": 4},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "bit": {"num_groups": 4},
    "codegen": {"rotary_dim": 4},
    "convnext": {"image_size": 64},
    "convnextv2": {"image_size": 64},
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "donut-swin": {"window_size": 2, "num_heads": [2, 2, 2, 2]},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
    "esm": {"pad_token_id": 1, "mask_token_id": 2, "position_embedding_type": "rotary"},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    "hubert": {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 16},
    "jamba": {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
              "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4,
              "use_mamba_kernels": False},
    "longcat_flash": {"num_key_value_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8},
    "minicpm3": {"num_key_value_heads": 4},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "qwen2_5_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                            "mrope_section": [2, 1, 1]}},
    "qwen2_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                          "mrope_section": [2, 1, 1]}},
    "qwen3_5_moe_text": {"layer_types": LINEAR},
    "qwen3_5_text": {"layer_types": LINEAR},
    "qwen3_next": {"layer_types": LINEAR},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "swin": {"window_size": 2, "num_heads": [2, 2, 2, 2]},
    "swinv2": {"window_size": 2, "num_heads": [2, 2, 2, 2]},
    "unispeech": {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 16},
    "unispeech-sat": {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 16},
    "wav2vec2": {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 16},
    "wav2vec2-conformer": {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 16},
    "wavlm": {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 16},
    "data2vec-audio": {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 4},
    "youtu": {"num_key_value_heads": 4},
    "zamba2": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid", "mamba", "hybrid"],
               "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_d_state": 8},
}  # fmt: skip
HEADS = (
    "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_CLASSIFICATION",
    "SPEECH_SEQ_2_SEQ", "CTC", "AUDIO_CLASSIFICATION", "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION",
    "OBJECT_DETECTION", "VIDEO_CLASSIFICATION",
)  # fmt: skip


@dataclass
class Family:
    """A model of one architecture.

    Attributes:
        name: as in the table.
        cls: name of the class that loads it; "" for a module that lowrank.save keeps.
        build: makes it, always with the same weights.
        batch: makes its inputs from a seed.
    """

    name: str
    cls: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Any]


def small(cls: Any, family: str) -> dict[str, Any]:
    """Arguments by which a config class describes a tiny model."""
    from transformers import PreTrainedConfig

    try:
        default = vars(cls())
    except Exception:  # a config that cannot be made without arguments is taken as it is
        return {}
    found: dict[str, Any] = {}
    for name, value in default.items():
        number = isinstance(value, int) and not isinstance(value, bool)
        if name in SIZES and number:
            found[name] = SIZES[name]
        elif isinstance(value, list | tuple) and value and isinstance(value[0], int):
            if name in WIDTHS:
                found[name] = [16 * (1 + i) for i in range(len(value))]
            elif name in {"depths", "num_blocks"}:
                found[name] = [1] * len(value)
            elif name in SIZES:
                found[name] = [min(SIZES[name], 8) if "size" in name else 2] * len(value)
    for name, sub in getattr(cls, "sub_configs", {}).items():
        if inspect.isclass(sub) and issubclass(sub, PreTrainedConfig):
            found[name] = small(sub, sub.model_type)
    return {**found, **OWN.get(family, {})}


def family_of(kind: str) -> Family | None:
    """A family of transformers, made small; None where it has no class that this can run."""
    import transformers as tf
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    tables = [f"MODEL_FOR_{head}_MAPPING_NAMES" for head in HEADS] + ["MODEL_MAPPING_NAMES"]
    named = next((vars(auto)[table][kind] for table in tables if kind in vars(auto)[table]), None)
    name = named if isinstance(named, str) or named is None else named[0]
    if name is None or not hasattr(tf, name):
        return None
    cls, config_class = getattr(tf, name), CONFIG_MAPPING[kind]

    def build() -> nn.Module:
        torch.manual_seed(0)
        config = config_class(**small(config_class, kind))
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in cls(copy.deepcopy(config)).parameters())
        if size > LARGEST:
            raise OverflowError(f"{size:,} parameters")
        torch.manual_seed(0)
        model: nn.Module = cls(config).eval()
        return model

    return Family(kind, name, build, lambda seed: inputs_of(cls, config_class, kind, seed))


def inputs_of(cls: Any, config_class: Any, kind: str, seed: int) -> dict[str, Tensor]:
    """Inputs by the name of a model's main input."""
    config = config_class(**small(config_class, kind))
    draw = torch.Generator().manual_seed(seed)
    main = cls.main_input_name
    parts = (config, getattr(config, "vision_config", None))
    side = next((p.image_size for p in parts if getattr(p, "image_size", None)), HEIGHT)
    side = max(side if isinstance(side, int) else side[0], HEIGHT)
    channels = next((p.num_channels for p in parts if hasattr(p, "num_channels")), 3)
    made: dict[str, Tensor] = {}
    if main == "input_ids":
        made[main] = torch.randint(3, VOCABULARY - 1, (4, 12), generator=draw)
    elif main == "pixel_values":
        made[main] = torch.randn(4, channels, side, side, generator=draw)
    elif main == "input_values":
        made[main] = torch.randn(4, 3200, generator=draw)
    elif main == "input_features":
        made[main] = torch.randn(4, getattr(config, "num_mel_bins", 16), 128, generator=draw)
    else:
        raise ValueError(f"no inputs for {main}")
    if config.is_encoder_decoder:
        made["decoder_input_ids"] = torch.randint(3, VOCABULARY - 1, (4, 6), generator=draw)
    return made


def plain() -> Iterator[Family]:
    """Families of diffusers, and modules that no library knows."""
    import diffusers

    from tests import zoo

    def pictures(channels: int, side: int) -> Callable[[int], Any]:
        return lambda seed: torch.randn(
            4, channels, side, side, generator=torch.Generator().manual_seed(seed)
        )

    def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            torch.manual_seed(0)
            return make().eval()

        return build

    def at_time(side: int, **more: Callable[[torch.Generator], Tensor]) -> Callable[[int], Any]:
        def batch(seed: int) -> dict[str, Tensor]:
            draw = torch.Generator().manual_seed(seed)
            picture = {"sample": torch.randn(4, 3, side, side, generator=draw)}
            return {**picture, **{name: one(draw) for name, one in more.items()}}

        return batch

    times = {"timestep": lambda draw: torch.randint(0, 1000, (4,), generator=draw)}
    words = {"encoder_hidden_states": lambda draw: torch.randn(4, 5, 32, generator=draw)}
    unet = {"block_out_channels": (32, 32), "layers_per_block": 1, "norm_num_groups": 8}
    attentive = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    crossed = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    yield Family("diffusers UNet2D", "diffusers.UNet2DModel",
                 seeded(lambda: diffusers.UNet2DModel(16, **unet, **attentive)),
                 at_time(16, **times))  # fmt: skip
    yield Family("diffusers UNet2DCondition", "diffusers.UNet2DConditionModel",
                 seeded(lambda: diffusers.UNet2DConditionModel(
                     16, in_channels=3, out_channels=3, cross_attention_dim=32,
                     attention_head_dim=8, **unet, **crossed)),
                 at_time(16, **times, **words))  # fmt: skip
    yield Family("diffusers AutoencoderKL", "diffusers.AutoencoderKL",
                 seeded(lambda: diffusers.AutoencoderKL(
                     block_out_channels=(32,), norm_num_groups=8, latent_channels=4)),
                 at_time(16))  # fmt: skip
    yield Family("diffusers VQModel", "diffusers.VQModel",
                 seeded(lambda: diffusers.VQModel(
                     block_out_channels=(32,), norm_num_groups=8, latent_channels=4)),
                 at_time(16))  # fmt: skip
    labels = {"class_labels": lambda draw: torch.randint(0, 5, (4,), generator=draw)}

    def latent(seed: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        inputs = {"hidden_states": torch.randn(4, 4, 8, 8, generator=draw)}
        return {**inputs, **{name: one(draw) for name, one in {**times, **labels}.items()}}

    yield Family("diffusers DiTTransformer2D", "diffusers.DiTTransformer2DModel",
                 seeded(lambda: diffusers.DiTTransformer2DModel(
                     num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8,
                     num_layers=2, norm_num_groups=4, sample_size=8, num_embeds_ada_norm=5)),
                 latent)  # fmt: skip

    def prompted(seed: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        return {
            "hidden_states": torch.randn(4, 4, 8, 8, generator=draw),
            "encoder_hidden_states": torch.randn(4, 5, 32, generator=draw),
            "timestep": torch.randint(0, 1000, (4,), generator=draw),
        }

    yield Family("diffusers PixArtTransformer2D", "diffusers.PixArtTransformer2DModel",
                 seeded(lambda: diffusers.PixArtTransformer2DModel(
                     num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8,
                     num_layers=2, sample_size=8, cross_attention_dim=32, caption_channels=32,
                     norm_num_groups=4, use_additional_conditions=False)),
                 prompted)  # fmt: skip

    def points(width: int) -> Callable[[int], Any]:
        return lambda seed: torch.randn(16, 6, width, generator=torch.Generator().manual_seed(seed))

    def ids(seed: int) -> Tensor:
        return torch.randint(0, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(seed))

    yield Family("torch MLP", "", seeded(lambda: zoo.mlp(24, 40, 40, 8)), points(24))
    yield Family("torch CNN", "", seeded(_cnn), pictures(3, 16))
    yield Family("torch Conv1d", "", seeded(_conv1d), lambda seed: points(24)(seed))
    yield Family("torch Conv3d", "", seeded(_conv3d), lambda seed: torch.randn(
        4, 3, 6, 8, 8, generator=torch.Generator().manual_seed(seed)))  # fmt: skip
    yield Family("torch autoencoder", "", seeded(lambda: zoo.mlp(24, 16, 4, 16, 24)), points(24))
    yield Family("torch TransformerEncoder", "", seeded(_encoder), points(WIDTH))
    yield Family("torch LSTM classifier", "", seeded(_recurrent), ids)
    yield Family("torch embedding bag", "", seeded(_bag), ids)


def _cnn() -> nn.Module:
    body = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    body += [nn.Conv2d(32, 48, 3, stride=2, padding=1), nn.BatchNorm2d(48), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))


def _conv1d() -> nn.Module:
    return nn.Sequential(nn.Conv1d(6, 32, 3), nn.ReLU(), nn.Conv1d(32, 32, 3), nn.Flatten(),
                         nn.Linear(640, 10))  # fmt: skip


def _conv3d() -> nn.Module:
    return nn.Sequential(nn.Conv3d(3, 16, 3), nn.ReLU(), nn.Conv3d(16, 16, 3),
                         nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, 10))  # fmt: skip


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 48, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.cell = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.middle = nn.Linear(WIDTH, 48)
        self.head = nn.Linear(48, 5)

    def forward(self, ids: Tensor) -> Tensor:
        states, _ = self.cell(self.table(ids))
        found: Tensor = self.head(self.middle(states[:, -1]).relu())
        return found


def _recurrent() -> nn.Module:
    return _Recurrent()


def _bag() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(VOCABULARY, WIDTH), nn.Linear(WIDTH, 48), nn.ReLU(),
                         nn.Linear(48, 5))  # fmt: skip


def outputs(model: nn.Module, batch: Any) -> Tensor:
    """Every floating number of an output, in one vector of float32."""
    with torch.no_grad():
        found = model(**batch) if isinstance(batch, Mapping) else model(batch)
    return torch.cat([t.float().flatten() for t in tensors_in(found) if t.is_floating_point()])


def close(found: Tensor, expected: Tensor) -> str:
    """ "yes", or by how much they differ."""
    if found.shape != expected.shape:
        return f"fault: {tuple(found.shape)} outputs, expected {tuple(expected.shape)}"
    if not bool(found.isfinite().all()):
        return "fault: not finite"
    scale = max(1.0, expected.abs().max().item())
    away = (found - expected).abs().max().item() / scale
    return "yes" if away < 1e-4 else f"fault: differs by {away:.1e}"


def within(report: Any, model: nn.Module, batch: Any) -> str:
    """ "yes" if no more than asked was kept and the outputs are finite."""
    kept = report.achieved
    if kept > RATIO + 1e-9:
        return f"fault: kept {kept:.3f}"
    return "yes" if bool(outputs(model, batch).isfinite().all()) else "fault: not finite"


def said(act: Callable[[], str]) -> str:
    """What a cell says: the result, the reason of a LowrankError, or the fault."""
    try:
        return act()
    except LowrankError as error:
        return str(error).split("\n")[0]
    except Exception as error:
        return f"fault: {type(error).__name__}: {str(error)[:200]}".replace("\n", " ")


@dataclass
class Row:
    """What one family gives."""

    name: str
    cls: str
    parameters: int = 0
    targets: float = 0.0
    cells: dict[str, str] = field(default_factory=dict)


def tried(family: Family, folder: Path) -> Row | None:
    """One row, without its cell "reload"; None where the dense model does not run as it is built.

    What was compressed with effort="fast" (or whitened, or without data) is saved into `folder`.
    """
    try:
        dense = family.build()
        batches = [family.batch(seed) for seed in range(4)]
        expected = outputs(dense, batches[0])
        repeated = outputs(dense, batches[0])
    except Exception:
        return None
    if not expected.isfinite().all() or not torch.equal(expected, repeated):
        return None
    row = Row(family.name, family.cls, sum(p.numel() for p in dense.parameters()))
    options: dict[str, dict[str, Any]] = {
        "data-free": {"data": None},
        "whitened": {"data": batches, "method": "whitened"},
        "fast": {"data": batches, "effort": "fast"},
    }
    lean: nn.Module | None = None
    for cell, given in options.items():
        made: list[nn.Module] = []

        def compressed(given: dict[str, Any] = given, made: list[nn.Module] = made) -> str:
            model, report = lowrank.compress(family.build(), RATIO, progress=False, **given)
            made.append(model)
            dense = sum(entry.dense.params for entry in report.plan.entries if entry.target)
            row.targets = dense / row.parameters
            return within(report, model, batches[0])

        row.cells[cell] = said(compressed)
        lean = made[0] if made else lean
    if lean is None:
        return row
    found = outputs(lean, batches[0])
    row.cells["reload"] = said(lambda: _saved(family, lean, batches[0], found, folder))
    row.cells["densified"] = said(
        lambda: close(outputs(lowrank.to_dense(copy.deepcopy(lean)), batches[0]), found)
    )
    row.cells["bf16"] = said(lambda: _in_bfloat16(family, batches))
    return row


def _saved(family: Family, model: nn.Module, batch: Any, found: Tensor, folder: Path) -> str:
    """Save it with what a new process has to find."""
    place = folder / family.name.replace(" ", "_")
    if family.cls:
        model.save_pretrained(place)  # type: ignore[operator]
    else:
        lowrank.save(model, place)
    probe = {"name": family.name, "cls": family.cls, "batch": batch, "outputs": found}
    torch.save(probe, place / "probe.pt")
    return "not reloaded"


def _in_bfloat16(family: Family, batches: Sequence[Any]) -> str:
    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.bfloat16() if value.is_floating_point() else value
        return {name: cast(one) for name, one in value.items()}

    dense = family.build().bfloat16()
    inputs = [cast(batch) for batch in batches]
    try:
        outputs(dense, inputs[0])
    except Exception:
        return "the dense model does not run in bfloat16"
    model, report = lowrank.compress(dense, RATIO, data=inputs, method="whitened", progress=False)
    return within(report, model, inputs[0])


def reloaded(folder: Path) -> dict[str, str]:
    """Family -> what loading it in this process gives."""
    torch.manual_seed(1)
    found = {}
    for place in sorted(path.parent for path in folder.glob("*/probe.pt")):
        probe = torch.load(place / "probe.pt", weights_only=False)
        found[probe["name"]] = said(lambda place=place, probe=probe: _loaded(place, probe))
    return found


def _loaded(place: Path, probe: dict[str, Any]) -> str:
    import diffusers
    import transformers

    if probe["cls"]:
        library = diffusers if probe["cls"].startswith("diffusers.") else transformers
        model = getattr(library, probe["cls"].rpartition(".")[2]).from_pretrained(place).eval()
    else:
        dense = next(one for one in plain() if one.name == probe["name"]).build()
        model = lowrank.load(place, dense)
    return close(outputs(model, probe["batch"]), probe["outputs"])


def row_of(name: str, folder: Path) -> Row | None:
    """The row of one family by name, within `SECONDS`."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    family = next((one for one in plain() if one.name == name), None) or family_of(name)
    if family is None:
        return None
    try:
        with limited(SECONDS):
            return tried(family, folder)
    except TooLong as error:
        return Row(name, family.cls, cells={"data-free": f"fault: {error}"})


def every_name() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return [*sorted(MODEL_MAPPING_NAMES), *(one.name for one in plain())]


def table(
    names: Sequence[str], jobs: int = 1, log: Callable[[Row], object] = lambda row: None
) -> list[Row]:
    """The rows of the families named, tried in that many processes."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
            for row in pool.map(row_of, names, [folder] * len(names)):
                if row is not None:
                    rows.append(row)
                    log(row)
        command = [sys.executable, "-m", "tests.architectures", "--reload", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        found = json.loads(done.stdout.splitlines()[-1])
    for row in rows:
        if row.name in found:
            row.cells["reload"] = found[row.name]
    return rows


def faults(rows: Sequence[Row]) -> list[str]:
    return [
        f"{row.name}: {cell}: {said}"
        for row in rows
        for cell, said in row.cells.items()
        if said.startswith(("fault", "not reloaded"))
    ]


def page(rows: Sequence[Row]) -> str:
    """The table as Markdown; reasons stand below it, by number."""
    reasons: dict[str, int] = {}
    lines = []
    for row in rows:
        cells = []
        for cell in CELLS:
            said = row.cells.get(cell, "")
            if said not in ("yes", ""):
                said = f"[{reasons.setdefault(said, len(reasons) + 1)}]"
            cells.append(said)
        share = f"{row.targets:.0%}"
        lines.append(f"| {row.name} | {row.parameters:,} | {share} | {' | '.join(cells)} |")
    head = ["name", "parameters", "targets", *CELLS]
    body = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *lines, ""]
    return "\n".join([*body, *(f"{number}. {said}" for said, number in reasons.items()), ""])


INTRODUCTION = f"""# Architectures

Tiny random models of many families, compressed to {RATIO} of their targets: without data, whitened
and with `effort="fast"`; loaded by their own library in a new process; merged back into dense
layers; and whitened in bfloat16. Outputs are equal within 1e-4 of the largest. "targets" is the
share of the parameters that can be factored. Written by `make architectures`, of which a tenth runs
in every check. Families of transformers are those whose configuration gets small by the names of
its entries and that run on plain inputs; those that need timm or natten are not among them.

"""


def main() -> None:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reload", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if arguments.reload:
        print(json.dumps(reloaded(arguments.reload)))
        return
    start = time.monotonic()

    def log(row: Row) -> None:
        wrong = {cell: said for cell, said in row.cells.items() if said not in ("yes",)}
        wrong.pop("reload", None)
        print(f"{row.name:32} {row.parameters:9,} {row.targets:4.0%} {wrong or ''}", flush=True)

    rows = table(arguments.names or every_name(), arguments.jobs, log)
    wrong = faults(rows)
    print(f"{len(rows)} families, {len(wrong)} faults, {time.monotonic() - start:.0f} s")
    print("\n".join(wrong))
    if not arguments.names:
        RESULTS.write_text(json.dumps([vars(row) for row in rows], indent=1) + "\n")
        PAGE.write_text(INTRODUCTION + page(rows))


if __name__ == "__main__":
    main()
