"""Encodings of the rows of W: float32, or those of TorchRec's quantised tables. Each row is encoded independently."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from mlet_dist.errors import UserError

_FP16_MAX = torch.finfo(torch.float16).max
_SCALE_BIAS_BYTES = 4  # two float16 behind each row


class RowOverflow(ValueError):
    """A row contains a value that is too large for the encoding.

    Attributes:
        row: its index among the encoded rows.
        reason: the message without the row.
    """

    def __init__(self, row: int, value: float, encoding: str) -> None:
        self.row = row
        self.reason = f"the value {value:.6g} is too large for {encoding}, whose numbers go up to {_FP16_MAX:,.0f}"
        super().__init__(f"row {row}: {self.reason}")


@dataclass(frozen=True)
class Part:
    """One of the tensors ``(n, columns)`` in which a table is stored."""

    columns: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return self.columns * self.dtype.itemsize


@dataclass(frozen=True)
class Encoding:
    """Stores rows of W in one or more tensors of a state dict, named after W with a suffix for each part.

    The bytes are those of ``torchrec.quant.EmbeddingBagCollection`` with ``quant_state_dict_split_scale_bias``, which
    sharded serving requires. TorchRec pads rows to 16 bytes in memory, but not in a state dict.

    Attributes:
        name: fp32, fp16, int8 or int4.
        bits: bits per value.
    """

    name: str
    bits: int
    _encode: Callable[[torch.Tensor], dict[str, torch.Tensor]]
    _decode: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]

    @property
    def is_quantised(self) -> bool:
        """Whether TorchRec's quantised modules serve this encoding, instead of its float modules."""
        return self.name != "fp32"

    @property
    def _multiple(self) -> int:
        return 16 // self.bits if self.bits < 16 else 1

    def fits(self, embedding_dim: int) -> bool:
        """Return whether rows of ``embedding_dim`` columns take a multiple of 16 bits, as TorchRec requires."""
        return embedding_dim % self._multiple == 0

    def check(self, embedding_dim: int) -> None:
        """Raise UserError unless rows of ``embedding_dim`` columns take a multiple of 16 bits, as TorchRec requires."""
        multiple = self._multiple
        if not self.fits(embedding_dim):
            raise UserError(
                f"{self.name} requires an embedding_dim that is a multiple of {multiple}, and it is {embedding_dim}; "
                f"remove {self.name} from the outputs"
            )

    def parts(self, embedding_dim: int) -> dict[str, Part]:
        """Return the parts that ``encode`` produces, by suffix."""
        if not self.is_quantised:
            return {"": Part(embedding_dim, torch.float32)}
        parts = {"": Part(embedding_dim * self.bits // 8, torch.uint8)}
        if self.bits < 16:
            parts |= {suffix: Part(1, torch.float16) for suffix in ("_qscale", "_qbias")}
        return parts

    def row_bytes(self, embedding_dim: int) -> int:
        """Return the bytes of one stored row, all parts together."""
        return sum(part.row_bytes for part in self.parts(embedding_dim).values())

    def encode(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode rows ``(r, d)`` float32, finite, contiguous, on the CPU, to tensors ``(r, columns)`` by suffix.

        Raises:
            RowOverflow: a value is too large for float16, in which an int8 or int4 row stores its minimum and its
                quantisation step.
        """
        encoded = self._encode(rows)
        for tensor in encoded.values():
            halves = tensor.view(torch.float16) if self.bits == 16 else tensor
            if halves.dtype == torch.float16 and not bool(halves.isfinite().all()):
                row = int((~halves.isfinite()).any(dim=1).nonzero()[0])
                raise RowOverflow(row, float(rows[row][rows[row].abs().argmax()]), self.name)
        return encoded

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the rows ``(r, d)`` float32 that a model looks up from encoded ``parts``."""
        return self._decode(parts)


def _encode_fp16(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"": rows.half().view(torch.uint8)}


def _decode_fp16(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return parts[""].contiguous().view(torch.float16).float()


def _int_encoder(bits: int) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    def encode(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        import fbgemm_gpu  # noqa: F401  # registers the operator

        fused = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(rows, bits)
        values = fused[:, :-_SCALE_BIAS_BYTES].contiguous()
        scale_bias = fused[:, -_SCALE_BIAS_BYTES:].contiguous().view(torch.float16)
        return {"": values, "_qscale": scale_bias[:, :1].contiguous(), "_qbias": scale_bias[:, 1:].contiguous()}

    return encode


def _int_decoder(bits: int) -> Callable[[Mapping[str, torch.Tensor]], torch.Tensor]:
    def decode(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        packed = parts[""].unsqueeze(2)
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)  # the first value of a byte is in its lowest bits
        values = (packed >> shifts) & (2**bits - 1)
        return values.flatten(1).float() * parts["_qscale"].float() + parts["_qbias"].float()

    return decode


ENCODINGS = {
    each.name: each
    for each in (
        Encoding("fp32", 32, lambda rows: {"": rows}, lambda parts: parts[""]),
        Encoding("fp16", 16, _encode_fp16, _decode_fp16),
        Encoding("int8", 8, _int_encoder(8), _int_decoder(8)),
        Encoding("int4", 4, _int_encoder(4), _int_decoder(4)),
    )
}
"""All encodings by name."""
