"""vLLM serves what `save_pretrained` wrote: plain and pivoted factors, shared bases, dense layers.

An out-of-tree plug-in, found by the entry point `vllm.general_plugins`. Only vLLM imports this
file, in each of its processes.
"""

from __future__ import annotations

from typing import Any

from vllm import distributed
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from .plugin import Declared, FactoredMethod


def register() -> None:
    """Make "lowrank" known to vLLM; called by it, perhaps more than once in a process."""
    if "lowrank" not in QUANTIZATION_METHODS:
        register_quantization_config("lowrank")(LowRankConfig)


class LowRankMethod(FactoredMethod, LinearMethodBase):
    """The plug-in's linear method."""

    DISTRIBUTED = distributed


class LowRankConfig(Declared, QuantizationConfig):
    """The plug-in's config."""

    ENGINE, LINEAR, METHOD, DENSE = "vLLM", LinearBase, LowRankMethod, UnquantizedLinearMethod

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Called with how vLLM renames the tensors of this architecture."""
        self.rename(hf_to_vllm_mapper.apply_dict)
