"""Save for transformers' from_pretrained, and load with every mismatch raised as an error."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import LowrankError, listed
from ..walk import layouts
from . import card as cards
from .declaration import attach, check_attachable, is_compressed
from .registration import install
from .specs import TELLS, check_finite


def save(
    model: nn.Module, folder: Path, tokenizer: Any, card: str | None, max_shard_size: str | None
) -> None:
    """`save_pretrained`, plus a model card and the code for trust_remote_code."""
    check_attachable(model)
    attach(model)
    sizes = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.save_pretrained(folder, **sizes)  # type: ignore[operator]
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if card is not None and is_compressed(model):
        cards.write(folder / "README.md", model, cards.auto_classes(model), card)


def from_pretrained(path: str | Path, auto_class: str | None = None, **kwargs: Any) -> Any:
    """Load a transformers model, factored or dense, from a folder or the hub.

    Args:
        path: a folder or hub name, as for transformers.
        auto_class: such as "AutoModelForCausalLM" or "LlamaForCausalLM"; by default the saved
            class (`config.architectures`).
        **kwargs: for transformers' from_pretrained (dtype, device_map, revision, token, …).

    Raises:
        LowrankError: transformers is not installed, the model cannot be loaded, or the weights of
            a factored model do not fit, where transformers would only warn and continue with
            random weights.
    """
    try:
        import transformers
    except ImportError as error:
        raise LowrankError("transformers is not installed: pip install transformers") from error
    install()  # the module may have been reloaded since
    where = str(path)
    if Path(where).is_absolute() and not Path(where).is_dir():
        raise LowrankError(f"cannot load {where}: there is no such folder")
    wants_info = kwargs.pop("output_loading_info", False)
    may_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
    asked = {**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}
    token = TELLS.set(True)
    try:
        loader = _loader(transformers, where, auto_class, kwargs)
        model, info = loader.from_pretrained(where, **asked)
    except LowrankError:
        raise
    except Exception as error:  # many libraries may raise here
        reason = " ".join(str(error).split())
        raise LowrankError(f"cannot load {where}: {type(error).__name__}: {reason:.300}") from error
    finally:
        TELLS.reset(token)
    _check_factors(where, model, info)
    same = is_compressed(model) and type(model).__name__ in (model.config.architectures or [])
    _check_loaded(where, info, complete=same, sizes=not may_mismatch)
    check_finite(model, where)
    return (model, info) if wants_info else model


def _loader(transformers: Any, where: str, auto_class: str | None, kwargs: dict[str, Any]) -> Any:
    """The class to call from_pretrained on."""
    if auto_class is not None:
        cls = getattr(transformers, auto_class, None)
        if cls is None:
            raise LowrankError(f"transformers has no class {auto_class!r}")
        return cls
    hub = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder")
    known = {key: kwargs[key] for key in (*hub, "token", "trust_remote_code") if key in kwargs}
    config = kwargs.get("config") or transformers.AutoConfig.from_pretrained(where, **known)
    names = getattr(config, "architectures", None) or []
    if not names:
        raise LowrankError(f"{where}: config.json names no architecture: pass auto_class=…")
    cls = getattr(transformers, names[0], None)
    if cls is not None:
        return cls
    autos = [name for name in getattr(config, "auto_map", None) or {} if "Model" in name]
    if not autos:
        raise LowrankError(f"{where}: transformers has no class {names[0]!r}: pass auto_class=…")
    return getattr(transformers, autos[0])


def _check_factors(where: str, model: nn.Module, info: dict[str, Any]) -> None:
    """Raises LowrankError if the files hold factors of a layer that was built dense.

    They would be left over, and the layer random, whatever else the caller permits. Tensors beside
    a weight that was found, such as another tool's scales, are none of ours.
    """
    prefix = getattr(model, "base_model_prefix", "")
    random = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    layers = {name for name, module in model.named_modules() if layouts.kind(module)}
    without = {name for name in layers if f"{name}.weight" in random} | random  # of experts
    lost = set()
    for key in info["unexpected_keys"]:
        for name in {key, key.removeprefix(f"{prefix}."), f"{prefix}.{key}"}:
            lost |= without & {name[:i] for i, letter in enumerate(name) if letter == "."}
    if lost:
        raise LowrankError(
            f"{where} holds factors of {listed(sorted(lost), 3)}, but its config.json does not say "
            "so: save the model again from where it was compressed (model.save_pretrained)"
        )


def _check_loaded(where: str, info: dict[str, Any], *, complete: bool, sizes: bool) -> None:
    """Raise LowrankError for mismatches in transformers' loading info.

    Args:
        complete: missing and unexpected tensors are errors. False for a class other than the saved
            one, whose head is new, and for a dense model, where transformers decides.
        sizes: tensors of another shape are errors.
    """
    problems: dict[str, set[str]] = {}
    if complete:
        problems = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"]}
    if sizes:
        problems["of another shape"] = {key[0] for key in info["mismatched_keys"]}
    parts = [f"{what}: {listed(sorted(names))}" for what, names in problems.items() if names]
    if parts:
        raise LowrankError(f"{where}: the weights do not fit config.json; {'; '.join(parts)}")


def skeleton(path: str | os.PathLike[str]) -> nn.Module:
    """The model of a folder or hub name on the meta device: only its config is read, no weight.

    Raises:
        LowrankError: transformers is not installed, or the config is none of a dense model of its.
    """
    import torch

    try:
        import transformers
    except ImportError as error:
        raise LowrankError("transformers is not installed: pip install transformers") from error
    where = os.fspath(path)
    try:
        config = transformers.AutoConfig.from_pretrained(where)
        if getattr(config, "quantization_config", None):
            raise LowrankError(f"{where} is quantized or factored already: expected a dense model")
        loader = _loader(transformers, where, None, {"config": config})
        build = getattr(loader, "_from_config", None) or loader.from_config
        with torch.device("meta"):
            model: nn.Module = build(config)
    except LowrankError:
        raise
    except Exception as error:  # many libraries may raise here
        reason = " ".join(str(error).split())
        raise LowrankError(
            f"{where} is no folder of a transformers model: {type(error).__name__}: {reason}"
        ) from error
    return model.eval()


def tokenizer_of(path: str) -> Any:
    """The tokenizer of a folder or hub name; None if there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception:  # many libraries may raise here
        return None
    # Without files, transformers returns one with special tokens only.
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_tokens) + 1 else None
