"""vLLM serves what `save_pretrained` wrote: plain and pivoted factors, shared bases, dense layers.

An out-of-tree plug-in, found by the entry point `vllm.general_plugins`. Only vLLM imports this
file, in each of its processes.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
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

    def device_rank(self) -> int:
        return int(get_tensor_model_parallel_rank())

    def device_count(self) -> int:
        return int(get_tensor_model_parallel_world_size())

    def is_staged(self) -> bool:
        try:
            return bool(get_pp_group().world_size > 1)
        except AssertionError:  # layers outside of an engine
            return False


class LowRankConfig(Declared, QuantizationConfig):
    """The plug-in's config."""

    ENGINE, LINEAR, METHOD, DENSE = "vLLM", LinearBase, LowRankMethod, UnquantizedLinearMethod

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Called with how vLLM renames the tensors of this architecture."""
        self.rename(hf_to_vllm_mapper.apply_dict)
