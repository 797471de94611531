"""Published quantized weights: the methods that are decoded while they are read, in one table. (Weights that stay
quantized in memory are in `layers/quantized.py`.)"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from llm_quest.errors import DataError
from llm_quest.hub.fp8 import ScaledTensor, join_fp8, read_scaled_into
from llm_quest.hub.gguf_blocks import EncodedTensor, read_encoded_into
from llm_quest.hub.mxfp4 import BlockTensor, join_mxfp4, read_blocks_into

PackedTensor = ScaledTensor | BlockTensor | EncodedTensor
QUANTIZATIONS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]] = {
    "fp8": join_fp8,
    "mxfp4": join_mxfp4,
}
"""quant_method -> (tensors of the files, quantization_config) -> the tensors, each matrix joined to its scales."""


def join_packed(sources: Mapping[str, Any], quantization: Any) -> dict[str, Any]:
    """The tensors with each quantized matrix joined to its scales. DataError for other methods."""
    is_known = isinstance(quantization, Mapping) and quantization.get("quant_method") in QUANTIZATIONS
    if not is_known:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise DataError(
            f"config.json: the weights are quantized by {method or 'an unnamed method'}; plain floats, "
            f"{', '.join(QUANTIZATIONS)} are read: take files in bfloat16, or have them written so first"
        )
    return QUANTIZATIONS[quantization["quant_method"]](sources, quantization)


def read_packed_into(source: PackedTensor, out: Tensor) -> int:
    """Decode a tensor into `out` (any device and dtype); return how many numbers are not finite."""
    if isinstance(source, EncodedTensor):
        return read_encoded_into(source, out)
    return read_blocks_into(source, out) if isinstance(source, BlockTensor) else read_scaled_into(source, out)
