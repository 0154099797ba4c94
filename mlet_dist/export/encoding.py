"""How a row of W is stored: float32, or as TorchRec's quantised tables hold it; each row by itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from mlet_dist.errors import UserError

_FP16_MAX = torch.finfo(torch.float16).max
_SCALE_BIAS_BYTES = 4  # two float16 behind each row


class RowOverflow(ValueError):
    """A row holds a value that the encoding cannot.

    Attributes:
        row: its number among the rows given.
    """

    def __init__(self, row: int, value: float, encoding: str) -> None:
        super().__init__(
            f"row {row} holds {value:.6g}, which {encoding} cannot: it keeps numbers up to {_FP16_MAX:,.0f}"
        )
        self.row = row


@dataclass(frozen=True)
class Part:
    """One of the tensors ``(n, columns)`` that a table is stored in."""

    columns: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return self.columns * self.dtype.itemsize


@dataclass(frozen=True)
class Encoding:
    """Rows of W as tensors of a state dict; a part's name there is that of W and the part's suffix.

    The bytes are those of ``torchrec.quant.EmbeddingBagCollection`` with ``quant_state_dict_split_scale_bias``, which
    sharded serving wants. In memory TorchRec pads rows to 16 bytes; a state dict has no padding.

    Attributes:
        name: fp32, fp16, int8 or int4.
        bits: of a value.
    """

    name: str
    bits: int
    _encode: Callable[[torch.Tensor], dict[str, torch.Tensor]]
    _decode: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]

    @property
    def is_quantised(self) -> bool:
        """Whether TorchRec's quantised modules serve it, and not its plain ones."""
        return self.name != "fp32"

    def check(self, embedding_dim: int) -> None:
        """Raise UserError where rows of so many columns cannot be stored so: TorchRec packs them to whole 16 bits."""
        multiple = 16 // self.bits if self.bits < 16 else 1
        if embedding_dim % multiple:
            raise UserError(
                f"{self.name} takes tables whose embedding_dim is a multiple of {multiple}, and it is {embedding_dim}; "
                "leave this output out"
            )

    def parts(self, embedding_dim: int) -> dict[str, Part]:
        """By suffix, what ``encode`` gives."""
        if not self.is_quantised:
            return {"": Part(embedding_dim, torch.float32)}
        parts = {"": Part(embedding_dim * self.bits // 8, torch.uint8)}
        if self.bits < 16:
            parts |= {suffix: Part(1, torch.float16) for suffix in ("_qscale", "_qbias")}
        return parts

    def row_bytes(self, embedding_dim: int) -> int:
        """Of a stored row, all parts together."""
        return sum(part.row_bytes for part in self.parts(embedding_dim).values())

    def encode(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """By suffix, tensors ``(r, columns)`` for rows ``(r, d)`` float32, finite, contiguous, on the CPU.

        Raises:
            RowOverflow: a value is larger than float16 holds. An int8 or int4 row keeps its least value and the step
                between two neighbouring ones so.
        """
        encoded = self._encode(rows)
        for tensor in encoded.values():
            halves = tensor.view(torch.float16) if self.bits == 16 else tensor
            if halves.dtype == torch.float16 and not bool(halves.isfinite().all()):
                row = int((~halves.isfinite()).any(dim=1).nonzero()[0])
                raise RowOverflow(row, float(rows[row][rows[row].abs().argmax()]), self.name)
        return encoded

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The rows ``(r, d)`` float32 that a model looks up where ``encode`` gave ``parts``."""
        return self._decode(parts)


def _as_half(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"": rows.half().view(torch.uint8)}


def _as_bits(bits: int) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    def encode(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        import fbgemm_gpu  # noqa: F401  # its operators

        fused = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(rows, bits)
        values = fused[:, :-_SCALE_BIAS_BYTES].contiguous()
        scale_bias = fused[:, -_SCALE_BIAS_BYTES:].contiguous().view(torch.float16)
        return {"": values, "_qscale": scale_bias[:, :1].contiguous(), "_qbias": scale_bias[:, 1:].contiguous()}

    return encode


def _of_half(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return parts[""].contiguous().view(torch.float16).float()


def _of_bits(bits: int) -> Callable[[Mapping[str, torch.Tensor]], torch.Tensor]:
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
        Encoding("fp16", 16, _as_half, _of_half),
        Encoding("int8", 8, _as_bits(8), _of_bits(8)),
        Encoding("int4", 4, _as_bits(4), _of_bits(4)),
    )
}
"""By name."""
