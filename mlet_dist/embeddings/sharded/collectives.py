"""Collectives of the sharded module.

- ``with_combined_gradients``: the all-reduce of W2's gradients in backward; ``gradient_factors``: what it averages.
- ``AllToAllRows``: the all-to-all of rows in forward, and of their gradients in backward.
- ``exchange_codecs``: codecs that round vectors and gradients to fp16 or bf16 on the network.
- ``AsyncAllReduceMax``: an all-reduce of a few integers that the host reads later.
"""

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any, Literal

import torch
from fbgemm_gpu.quantize_comm import QuantizationContext
from fbgemm_gpu.quantize_comm import QuantizedCommCodec as FbgemmCodec
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torchrec.distributed.comm_ops import get_gradient_division
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.types import CommOp, QuantizedCommCodec, QuantizedCommCodecs

CommPrecision = Literal["fp32", "fp16", "bf16"]
"""The dtype of vectors or of their gradients on the network."""

_MAX_SCALE = 1 << 12


def with_combined_gradients(
    weights: Mapping[str, torch.Tensor], partial: Collection[str], process_group: dist.ProcessGroup | None
) -> dict[str, torch.Tensor]:
    """Return the weights such that backward leaves the gradient of the mean of the ranks' losses on every rank.

    One all-reduce combines all gradients, so every rank must run backward through the result. DDP cannot do this: it
    requires a model whose ``forward`` returns tensors, and TorchRec's collections return a LazyAwaitable.

    If W2 is applied after the exchange, each rank has the gradient of its own loss, and the gradients are averaged as
    by DDP. If W2 is applied before the exchange, each rank has the gradient of all ranks' bags with respect to its own
    rows (a partial gradient), and the gradients are summed.

    Args:
        weights: W2 ``(k, d)`` by table.
        partial: tables whose W2 is applied before the exchange.
        process_group: the ranks.

    Returns:
        The weights, with the same keys.
    """
    if not weights or not torch.is_grad_enabled() or dist.get_world_size(process_group) == 1:
        return dict(weights)
    factors = list(gradient_factors(weights, partial, process_group).values())
    return dict(zip(weights, _CombinedGradients.apply(process_group, factors, *weights.values()), strict=True))


def gradient_factors(
    tables: Collection[str], partial: Collection[str], process_group: dist.ProcessGroup | None
) -> dict[str, float]:
    """Return by table the factor of a rank's gradient of W2 in the sum over all ranks (``with_combined_gradients``)."""
    mean = 1 / dist.get_world_size(process_group)
    # By default TorchRec divides gradients by the world size in the exchange's backward (comm_ops.GRADIENT_DIVISION).
    of_partial = 1.0 if get_gradient_division() else mean
    return {name: of_partial if name in partial else mean for name in tables}


class _CombinedGradients(torch.autograd.Function):
    """Identity in forward; backward all-reduces the scaled gradients in one flat buffer."""

    @staticmethod
    def forward(
        ctx: Any, process_group: dist.ProcessGroup | None, factors: list[float], *weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.process_group, ctx.factors = process_group, factors
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = [gradient.reshape(-1) * factor for gradient, factor in zip(gradients, ctx.factors, strict=True)]
        flat = torch.cat(scaled)
        dist.all_reduce(flat, group=ctx.process_group)
        parts = flat.split([gradient.numel() for gradient in gradients])
        return None, None, *(part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True))


class AllToAllRows(torch.autograd.Function):
    """An all-to-all of rows, flat: ``(sum of send,)`` -> ``(sum of receive,)``; backward sends their gradients back.

    ``send`` and ``receive`` are the numbers of values by rank. ``codecs`` encode rows and gradients. Backward divides
    by the world size if TorchRec does (``comm_ops.GRADIENT_DIVISION``), so that the owners sum up the gradient of the
    mean of the ranks' losses.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        send: list[int],
        receive: list[int],
        process_group: dist.ProcessGroup,
        codecs: QuantizedCommCodecs,
    ) -> torch.Tensor:
        ctx.send, ctx.receive, ctx.process_group, ctx.codec = send, receive, process_group, codecs.backward
        return _all_to_all(rows, send, receive, process_group, codecs.forward)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        returned = _all_to_all(gradient, ctx.receive, ctx.send, ctx.process_group, ctx.codec)
        if get_gradient_division():
            returned /= dist.get_world_size(ctx.process_group)
        return returned, None, None, None, None


def _all_to_all(
    values: torch.Tensor,
    send: list[int],
    receive: list[int],
    process_group: dist.ProcessGroup,
    codec: QuantizedCommCodec,
) -> torch.Tensor:
    context = codec.create_context()
    encoded = codec.encode(values, context)
    sent, expected = (_encoded_sizes(codec, sizes, context) for sizes in (send, receive))
    received = encoded.new_empty(sum(expected))
    dist.all_to_all_single(received, encoded, expected, sent, group=process_group)
    return codec.decode(received, context)


def _encoded_sizes(codec: QuantizedCommCodec, sizes: list[int], context: Any) -> list[int]:
    if _dtype(codec).is_floating_point:  # each value is encoded as one
        return sizes
    return [codec.calc_quantized_size(size, context) for size in sizes]


def exchange_codecs(
    forward: CommPrecision, backward: CommPrecision, local_batch_size: int = 1
) -> dict[str, QuantizedCommCodecs] | None:
    """Return a ``qcomm_codecs_registry`` for TorchRec's sharders and this package's; None if both are fp32.

    The mean over a batch of b scales gradients by 1/b, and fp16 has no positive values below 6e-8. Therefore fp16
    gradients are multiplied by a loss scale before they are sent and divided by it afterwards: the largest power of two
    that is at most b and at most 4,096. Scaled values beyond ±65,504 are clamped.

    Args:
        forward: dtype of vectors.
        backward: dtype of their gradients.
        local_batch_size: b, the batch size of one rank.
    """
    # No device is passed: for "cpu" TorchRec replaces bf16 by fp16, because older versions of gloo cannot add bf16.
    registry = get_qcomm_codecs_registry(QCommsConfig(CommType(forward), CommType(backward)))
    if registry is not None and backward == "fp16":
        scale = 1 << (min(local_batch_size, _MAX_SCALE).bit_length() - 1)
        for codecs in registry.values():
            codecs.backward = ScaledFp16Codec(scale)
    return registry


class ScaledFp16Codec(FbgemmCodec):
    """fbgemm's fp16 codec with a loss scale, which is removed after decoding to float32.

    fbgemm's own ``loss_scale`` is removed in fp16, before decoding, so small values are rounded to zero after all.
    """

    def __init__(self, scale: float) -> None:
        super().__init__(SparseType.FP16)
        self._scale = scale

    def encode(self, input_tensor: torch.Tensor, ctx: QuantizationContext | None = None) -> torch.Tensor:
        return super().encode(input_tensor * self._scale, ctx)

    def decode(self, input_tensor: torch.Tensor, ctx: QuantizationContext | None = None) -> torch.Tensor:
        return super().decode(input_tensor, ctx) / self._scale


def codecs_of(registry: Mapping[str, QuantizedCommCodecs] | None, operation: CommOp) -> QuantizedCommCodecs:
    """Return the codecs of a collective; if the registry has none, codecs that change nothing."""
    return (registry or {}).get(operation.name) or QuantizedCommCodecs()


def value_bytes(codecs: QuantizedCommCodecs) -> int:
    """Return the bytes of one value in forward plus its gradient in backward: 8 in float32."""
    return sum(forward_backward_bytes(codecs))


def forward_backward_bytes(codecs: QuantizedCommCodecs) -> tuple[int, int]:
    """Return the bytes of one value in forward, and of its gradient in backward."""
    return _dtype(codecs.forward).itemsize, _dtype(codecs.backward).itemsize


def _dtype(codec: QuantizedCommCodec) -> torch.dtype:
    # It is a property of fbgemm's codecs and a method of TorchRec's NoOpQuantizedCommCodec.
    dtype = codec.quantized_dtype
    return dtype() if callable(dtype) else dtype


class AsyncAllReduceMax:
    """An asynchronous all-reduce (MAX) of integers that the host reads later. A collective call.

    Neither the host nor the current stream of a device waits for it.

    Args:
        codes: ``(n,)`` int64 on a device that the process group supports; it is overwritten.
        process_group: the ranks.
    """

    def __init__(self, codes: torch.Tensor, process_group: dist.ProcessGroup | None) -> None:
        self._codes = codes
        self._work = self._copied = None
        if dist.get_world_size(process_group) > 1:
            self._work = dist.all_reduce(codes, dist.ReduceOp.MAX, group=process_group, async_op=True)
        if codes.is_cuda:
            stream = _copying_stream(codes.device)
            stream.wait_stream(torch.cuda.current_stream(codes.device))
            with torch.cuda.stream(stream):
                if self._work is not None:
                    self._work.wait()
                self._codes = torch.empty_like(codes, device="cpu", pin_memory=True).copy_(codes, non_blocking=True)
                self._copied = stream.record_event()
            codes.record_stream(stream)
            self._work = None

    def read(self) -> list[int]:
        """Return the maxima over all ranks; waits for the all-reduce, but not for other work of the device."""
        if self._work is not None:
            self._work.wait()
        if self._copied is not None:
            self._copied.synchronize()
        self._work = self._copied = None
        found: list[int] = self._codes.numpy().tolist()  # they are in the host's memory
        return found


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
