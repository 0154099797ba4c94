"""A pool of tables against kernels of one table each: the same bits, in rows, updates and optimizer state."""

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mlet_dist.embeddings.sharded.table_pool import TablePool

ROWS, WIDTH = (9, 1, 300, 4), 8
OPTIMIZERS = [EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_ROWWISE_ADAGRAD]


def _kernel(
    rows: tuple[int, ...], optimizer: EmbOptimType, precision: SparseType
) -> SplitTableBatchedEmbeddingBagsCodegen:
    return SplitTableBatchedEmbeddingBagsCodegen(
        [(number, WIDTH, EmbeddingLocation.HOST, ComputeDevice.CPU) for number in rows],
        optimizer=optimizer,
        weights_precision=precision,
        output_dtype=SparseType.FP32,
        pooling_mode=PoolingMode.SUM,
        stochastic_rounding=False,
        learning_rate=0.5,
    )


def _ids(draw: torch.Generator, step: int) -> list[torch.Tensor]:
    counts = [(5, 1, 250, 0), (0, 0, 0, 4), (0, 0, 0, 0), (9, 1, 300, 4)][step]
    return [torch.randperm(number, generator=draw)[:count] for number, count in zip(ROWS, counts, strict=True)]


@pytest.mark.parametrize("precision", [SparseType.FP32, SparseType.FP16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_pool_equals_a_kernel_for_each_table(optimizer: EmbOptimType, precision: SparseType) -> None:
    together, apart = _kernel(ROWS, optimizer, precision), [_kernel((each,), optimizer, precision) for each in ROWS]
    draw = torch.Generator().manual_seed(3)
    for weight, kernel in zip(together.split_embedding_weights(), apart, strict=True):
        weight.copy_(torch.randn(weight.shape, generator=draw))
        kernel.split_embedding_weights()[0].copy_(weight)
    pool = TablePool(together)
    names = [f"t{index}" for index in range(len(ROWS))]
    for step in range(4):
        for kernel in (together, *apart):
            kernel.set_learning_rate(0.5 / (step + 1))
        ids = _ids(draw, step)
        found = pool(
            KeyedJaggedTensor(names, torch.cat(ids), lengths=torch.tensor([len(each) for each in ids]), stride=1)
        )
        expected = torch.cat(
            [kernel(each, torch.arange(len(each) + 1)) for kernel, each in zip(apart, ids, strict=True)]
        )
        assert torch.equal(found, expected)
        gradient = torch.randn(expected.shape, generator=draw)
        found.backward(gradient)
        expected.backward(gradient)
    for index, kernel in enumerate(apart):
        assert torch.equal(together.split_embedding_weights()[index], kernel.split_embedding_weights()[0])
        found_states, expected_states = together.split_optimizer_states(), kernel.split_optimizer_states()
        assert len(found_states) == (0 if optimizer == EmbOptimType.EXACT_SGD else len(ROWS))
        for own, other in zip(found_states[index : index + 1], expected_states, strict=True):
            assert len(own) == len(other) > 0
            assert all(torch.equal(*pair) for pair in zip(own, other, strict=True))


def test_tables_of_different_widths_are_refused() -> None:
    specs = [(4, width, EmbeddingLocation.HOST, ComputeDevice.CPU) for width in (4, 8)]
    with pytest.raises(ValueError, match=r"\[4, 8\] columns cannot be one table"):
        TablePool(SplitTableBatchedEmbeddingBagsCodegen(specs, optimizer=EmbOptimType.EXACT_SGD))
