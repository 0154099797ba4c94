"""Collectives of the sharded module: agreement between ranks, the all-to-all of rows, W2's gradients, and codecs."""

from collections.abc import Collection, Mapping
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


class Agreement:
    """The largest code that a rank has, of each kind. A collective call; it is waited for when it is read.

    Args:
        codes: ``(n,)`` int64, overwritten; on the device of the process group.
        process_group: the ranks.
    """

    def __init__(self, codes: torch.Tensor, process_group: dist.ProcessGroup | None) -> None:
        self._codes = codes
        self._work = self._copied = None
        if dist.get_world_size(process_group) > 1:
            self._work = dist.all_reduce(codes, dist.ReduceOp.MAX, group=process_group, async_op=True)
        if codes.is_cuda:
            # The copy is ordered behind the all-reduce here, so that reading it waits for no other stream's work.
            if self._work is not None:
                self._work.wait()
            self._work = None
            self._codes = torch.empty_like(codes, device="cpu", pin_memory=True).copy_(codes, non_blocking=True)
            self._copied = torch.cuda.current_stream(codes.device).record_event()

    def read(self) -> list[int]:
        """The codes, once the other ranks' have come; other work of a device is not waited for."""
        if self._work is not None:
            self._work.wait()
        if self._copied is not None:
            self._copied.synchronize()
        self._work = self._copied = None
        return self._codes.tolist()


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


def with_combined_gradients(
    weights: Mapping[str, torch.Tensor], partial: Collection[str], process_group: dist.ProcessGroup | None
) -> dict[str, torch.Tensor]:
    """The same weights by the same names, whose gradients arrive on every rank as those of the mean of the losses.

    A weight that is applied after an exchange has on each rank the gradient of the rank's own loss: they are averaged,
    as by DDP. DDP itself serves only models whose ``forward`` returns tensors, and TorchRec's collections return a
    LazyAwaitable. All gradients go in one all-reduce; every rank must run backward through it.

    Args:
        weights: W2 by table.
        partial: tables whose weight is applied before an exchange. There a rank sees the bags' gradients from all
            ranks, but only of its own rows: they are summed.
        process_group: the ranks.
    """
    if not weights or not torch.is_grad_enabled() or dist.get_world_size(process_group) == 1:
        return dict(weights)
    mean, of_partial = 1 / dist.get_world_size(process_group), _partial_factor(process_group)
    factors = [of_partial if name in partial else mean for name in weights]
    return dict(zip(weights, _CombinedGradients.apply(process_group, factors, *weights.values()), strict=True))


def _partial_factor(process_group: dist.ProcessGroup | None) -> float:
    # TorchRec divides gradients by the world size on their way to the rows (comm_ops.GRADIENT_DIVISION).
    return 1.0 if get_gradient_division() else 1 / dist.get_world_size(process_group)


class _CombinedGradients(torch.autograd.Function):
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
    """Send rows ``(sum of send, d)`` by rank, receive ``(sum of received, d)``; backward sends gradients back.

    Both travel as ``codecs`` encode them. Backward divides by the world size where TorchRec does
    (``comm_ops.GRADIENT_DIVISION``), so that the rows' owners sum up the gradient of the mean loss.
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
    rows: torch.Tensor,
    send: list[int],
    receive: list[int],
    process_group: dist.ProcessGroup,
    codec: QuantizedCommCodec,
) -> torch.Tensor:
    width, context = rows.shape[1], codec.create_context()
    encoded = codec.encode(rows.reshape(-1), context)
    sent, expected = (
        [codec.calc_quantized_size(count * width, context) for count in counts] for counts in (send, receive)
    )
    received = encoded.new_empty(sum(expected))
    dist.all_to_all_single(received, encoded, expected, sent, group=process_group)
    return codec.decode(received, context).view(sum(receive), width)
