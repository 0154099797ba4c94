import pytest
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, GroupedEmbeddingConfig, ShardedEmbeddingTable
from torchrec.modules.embedding_configs import DataType, PoolingType

from mlet_dist.embeddings.sharded.row_lookup import group_for_rows


def _group(*widths: int, kernel: EmbeddingComputeKernel = EmbeddingComputeKernel.FUSED) -> GroupedEmbeddingConfig:
    tables = [
        ShardedEmbeddingTable(
            name=f"t{index}",
            num_embeddings=1000,
            embedding_dim=width,
            local_rows=500,
            local_cols=width,
            feature_names=["a", "b"],
            embedding_names=["a", "b"],
        )
        for index, width in enumerate(widths)
    ]
    return GroupedEmbeddingConfig(DataType.FP32, PoolingType.SUM, True, False, kernel, tables, {"learning_rate": 0.1})


@pytest.mark.parametrize(
    ("expected", "kernels"),
    [
        ([1, 2, 3], [["t0", "t1", "t2"]]),
        ([1024, 1, 1025], [["t0", "t1"], ["t2"]]),  # 1024 rows of 64 float32 are 256 KB
        ([9999, 1, 9999], [["t1"], ["t0"], ["t2"]]),
        ([9999, 9999, 9999], [["t0"], ["t1"], ["t2"]]),
    ],
)
def test_each_table_of_many_rows_without_a_fused_optimizer_has_its_own_kernel(
    expected: list[float], kernels: list[list[str]]
) -> None:
    rows = {f"t{index}": float(count) for index, count in enumerate(expected)}
    group = _group(64, 64, 64, kernel=EmbeddingComputeKernel.DENSE)
    found = group_for_rows([group], rows, dict.fromkeys(rows, 4), unpooled=False)
    assert [kernel.table_names() for kernel in found] == kernels
    assert all(kernel.pooling == PoolingType.SUM and not kernel.is_weighted for kernel in found)
    assert all(kernel.fused_params == {"learning_rate": 0.1} for kernel in found)


def test_all_tables_with_a_fused_optimizer_share_a_kernel() -> None:
    rows = {"t0": 1e9, "t1": 1.0, "t2": 1e9}
    found = group_for_rows([_group(64, 64, 8)], rows, dict.fromkeys(rows, 4), unpooled=False)
    assert [kernel.table_names() for kernel in found] == [["t0", "t1"], ["t2"]]


def test_cuda_has_one_unpooled_kernel_per_group() -> None:
    rows = {"t0": 1e9, "t1": 1.0}
    found = group_for_rows([_group(64, 64), _group(8)], rows, dict.fromkeys(rows, 4), unpooled=True)
    assert [kernel.table_names() for kernel in found] == [["t0", "t1"], ["t0"]]
    assert all(kernel.pooling == PoolingType.NONE for kernel in found)


def test_ids_of_a_table_with_two_features_are_looked_up_once() -> None:
    (kernel,) = group_for_rows([_group(64)], {"t0": 1.0}, {"t0": 4}, unpooled=False)
    assert kernel.feature_names() == ["t0"]


@pytest.mark.parametrize("unpooled", [False, True])
def test_kernels_come_in_the_order_of_d(unpooled: bool) -> None:
    rows, dims = {"t0": 1.0, "t1": 1.0, "t2": 1.0, "t3": 1.0}, {"t0": 8, "t1": 4, "t2": 8, "t3": 4}
    found = group_for_rows([_group(64, 64, 8, 64)], rows, dims, unpooled=unpooled)
    assert [kernel.table_names() for kernel in found] == [["t1", "t3"], ["t0"], ["t2"]]
