"""What vectors and their gradients are rounded to on the network: TorchRec's quantised communication."""

from collections.abc import Mapping
from typing import Literal

import torch
from fbgemm_gpu.quantize_comm import QuantizationContext
from fbgemm_gpu.quantize_comm import QuantizedCommCodec as FbgemmCodec
from fbgemm_gpu.split_embedding_configs import SparseType
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.types import CommOp, QuantizedCommCodec, QuantizedCommCodecs

CommPrecision = Literal["fp32", "fp16", "bf16"]

_LARGEST_SCALE = 1 << 12


def exchange_codecs(
    forward: CommPrecision, backward: CommPrecision, local_batch_size: int = 1
) -> dict[str, QuantizedCommCodecs] | None:
    """A ``qcomm_codecs_registry`` for TorchRec's sharders and ours; None where both are fp32.

    The gradient of the mean loss of b rows is 1/b of a row's own, and fp16 keeps nothing below 6e-8. So fp16 gradients
    travel multiplied by the largest power of two that is at most b and 4,096; a product beyond ±65,504 is clamped.

    Args:
        forward: of vectors.
        backward: of their gradients.
        local_batch_size: b, rows of a batch on one rank.
    """
    # Without a device: on cpu it would turn bf16 into fp16, for the sake of gloos that could not add it up.
    registry = get_qcomm_codecs_registry(QCommsConfig(CommType(forward), CommType(backward)))
    if registry is not None and backward == "fp16":
        scale = 1 << (min(local_batch_size, _LARGEST_SCALE).bit_length() - 1)
        for codecs in registry.values():
            codecs.backward = ScaledFp16Codec(scale)
    return registry


class ScaledFp16Codec(FbgemmCodec):
    """fbgemm's fp16 codec of ``scale`` times the values.

    fbgemm's own ``loss_scale`` divides before it decodes, in fp16, and so loses again what the scale had saved.
    """

    def __init__(self, scale: float) -> None:
        super().__init__(SparseType.FP16)
        self._scale = scale

    def encode(self, input_tensor: torch.Tensor, ctx: QuantizationContext | None = None) -> torch.Tensor:
        return super().encode(input_tensor * self._scale, ctx)

    def decode(self, input_tensor: torch.Tensor, ctx: QuantizationContext | None = None) -> torch.Tensor:
        return super().decode(input_tensor, ctx) / self._scale


def codecs_of(registry: Mapping[str, QuantizedCommCodecs] | None, operation: CommOp) -> QuantizedCommCodecs:
    """The codecs of a collective; those that change nothing where the registry has none."""
    return (registry or {}).get(operation.name) or QuantizedCommCodecs()


def value_bytes(codecs: QuantizedCommCodecs) -> int:
    """Bytes of one value forward and of its gradient backward: 8 in float32."""
    return sum(each_way_bytes(codecs))


def each_way_bytes(codecs: QuantizedCommCodecs) -> tuple[int, int]:
    """Bytes of one value forward, and of its gradient backward."""
    return _dtype(codecs.forward).itemsize, _dtype(codecs.backward).itemsize


def _dtype(codec: QuantizedCommCodec) -> torch.dtype:
    # A property of codecs; of TorchRec's that changes nothing, a method.
    dtype = codec.quantized_dtype
    return dtype() if callable(dtype) else dtype
