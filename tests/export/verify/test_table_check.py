"""Tables of a run and of an output are compared block by block."""

import math
from dataclasses import dataclass

import pytest
import torch

from mlet_dist.export.encoding import ENCODINGS
from mlet_dist.export.verify import table_check
from mlet_dist.export.verify.table_check import StoredOutput, TableError, check_table


@dataclass
class _Table:
    """W1 and W2 in memory."""

    stored: torch.Tensor
    projection: torch.Tensor
    state_name: str = "t.weight"

    @property
    def num_embeddings(self) -> int:
        return len(self.stored)

    @property
    def hidden_dim(self) -> int:
        return self.stored.shape[1]

    @property
    def embedding_dim(self) -> int:
        return self.projection.shape[1]

    def read_stored(self, start: int, stop: int) -> torch.Tensor:
        return self.stored[start:stop].clone()


@dataclass
class _Files:
    tensors: dict[str, torch.Tensor]

    def read_rows(self, name: str, start: int, out: torch.Tensor) -> None:
        out.copy_(self.tensors[name][start : start + len(out)])


@pytest.mark.parametrize("name", list(ENCODINGS))
def test_errors_and_kept_rows_equal_those_of_the_full_tables(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_check, "_BLOCK_BYTES", 7 * 4 * 12)  # 7 rows
    torch.manual_seed(0)
    table = _Table(torch.randn(50, 12), torch.randn(12, 8))
    product, encoding = table.stored @ table.projection, ENCODINGS[name]
    parts = encoding.encode(product)
    files = _Files({f"t.weight{suffix}": part for suffix, part in parts.items()})
    wanted, read = torch.tensor([0, 6, 7, 20, 49]), []
    checked = check_table(table, {"x": StoredOutput("x", encoding, files)}, wanted, read.append)  # type: ignore
    assert read == [7] * 7 + [1]
    assert torch.equal(checked.stored, table.stored[wanted])
    for suffix, part in parts.items():
        assert torch.equal(checked.parts["x"][suffix], part[wanted])
    error = (encoding.decode(parts).double() - product.double()).abs()
    found = checked.errors["x"].to_dict()
    assert found["max_abs_error"] == pytest.approx(float(error.max()), abs=2e-6)
    assert found["relative_error"] == pytest.approx(float(error.norm() / product.double().norm()), abs=1e-6)
    if name != "fp32":
        assert found["worst_row"] == int(error.amax(dim=1).argmax())


def test_the_error_of_a_value_that_is_not_finite_is_infinite_and_of_zeros_zero() -> None:
    error = TableError()
    error.add(0, torch.zeros(3, 2), torch.zeros(3, 2))
    assert error.to_dict() == {"max_abs_error": 0.0, "worst_row": 0, "relative_error": 0.0}
    error.add(3, torch.zeros(3, 2), torch.tensor([[0.0, 0.0], [0.0, math.nan], [0.0, 1.0]]))
    assert error.to_dict() == {"max_abs_error": math.inf, "worst_row": 4, "relative_error": math.inf}
