"""Adaptive tables against a dense float64 reference with masks, on 1 to 3 ranks, while rows move between widths."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards
from torchrec.modules.embedding_configs import PoolingType
from torchrec.optim.keyed import KeyedOptimizer

from mlet_dist.embeddings import MultiLayerEmbeddingBagCollection, MultiLayerEmbeddingBagConfig
from mlet_dist.embeddings.row_moves import AdaptiveRows
from mlet_dist.embeddings.slot_layout import SlotLayout
from mlet_dist.embeddings.table_config import RowRange
from tests.helpers.dense_reference import Bags, toy_loss
from tests.helpers.ranks import RankPool
from tests.helpers.sharded_module import full_weights, optimizer_of, record_steps, shard, to_kjt

pytestmark = pytest.mark.multirank

Ranks = Callable[[int], RankPool]
RATES = {"rows": 0.05, "projections": 0.02}
STEPS, GLOBAL_BATCH, DIM = 7, 24, 4
MOVES = AdaptiveRows(interval=2, warmup=1, decay=0.5, hysteresis=0.1)


def _table(
    name: str, ranges: list[tuple[int, int]], features: list[str], pooling: PoolingType = PoolingType.SUM
) -> MultiLayerEmbeddingBagConfig:
    return MultiLayerEmbeddingBagConfig(
        name=name,
        num_embeddings=sum(rows for rows, _ in ranges),
        embedding_dim=DIM,
        hidden_dim=16,
        feature_names=features,
        pooling=pooling,
        row_ranges=[RowRange(*each) for each in ranges],
    )


def _tables() -> list[MultiLayerEmbeddingBagConfig]:
    return [
        _table("wide", [(30, 16), (50, 4), (130, 0)], ["f0", "f1"]),
        _table("averaged", [(20, 16), (60, 8), (30, 4), (50, 0)], ["f2", "f0"], PoolingType.MEAN),
        _table("whole", [(30, 8), (5, 4)], ["f3"]),
    ]


def _bags(step: int, weighted: bool) -> Bags:
    draw = random.Random(step)
    sizes = {"f0": 160, "f1": 210, "f2": 160, "f3": 35}

    def entry(n: int) -> tuple[int, float]:
        # The popular rows are others in each step, so that rows move.
        row = int(n * draw.random() ** 3 + step * n / 5) % n
        return row, draw.uniform(0.5, 2.0) if weighted else 1.0

    shortest = 0 if weighted else 1
    return {
        name: [[entry(n) for _ in range(draw.randint(shortest, 3 if weighted else 1))] for _ in range(GLOBAL_BATCH)]
        for name, n in sizes.items()
    }


def _train(optimizer: str, weighted: bool, settings: AdaptiveRows = MOVES) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    first, last = rank * GLOBAL_BATCH // world, (rank + 1) * GLOBAL_BATCH // world
    meta = MultiLayerEmbeddingBagCollection(
        _tables(), is_weighted=weighted, device=torch.device("meta"), seed=3, adaptive=settings
    )
    model = shard(meta, optimizer, exchange="unique_rows")
    batches = (to_kjt(_bags(step, weighted), first, last, weighted) for step in range(STEPS))
    return record_steps(model, optimizer_of(model, optimizer, RATES), batches)


@dataclass
class Masked:
    """One table: for each width all rows in float64, of which each row uses those of the width that it has."""

    rows: dict[int, torch.Tensor]
    projections: dict[int, torch.Tensor]
    widths: torch.Tensor
    sums: dict[int, torch.Tensor] = field(default_factory=dict)
    means: dict[int, torch.Tensor] = field(default_factory=dict)
    projection_sums: dict[int, torch.Tensor] = field(default_factory=dict)
    projection_means: dict[int, torch.Tensor] = field(default_factory=dict)

    def product(self) -> torch.Tensor:
        total = torch.zeros(len(self.widths), DIM, dtype=torch.float64, requires_grad=True) * 1
        for width, rows in self.rows.items():
            product = rows @ self.projections[width] if width in self.projections else rows
            total = total + product * (self.widths == width).unsqueeze(1)
        return total

    def move(self, widths: torch.Tensor) -> None:
        """Give rows other widths, and keep their vectors."""
        vectors = self.product().detach()
        for row in (widths != self.widths).nonzero().squeeze(1).tolist():
            old, new = int(self.widths[row]), int(widths[row])
            if not new:
                continue
            vector = vectors[row]
            if new in self.projections:
                vector = vector @ _inverse(self.projections[new].detach())
            with torch.no_grad():
                self.rows[new][row] = vector if old else 0.0
            self.sums[new][row] = self.sums[old][row].mean() * old / new if old else 0.0
            mean = self.means[old][row] if old else torch.zeros(DIM, dtype=torch.float64)
            if old in self.projections:
                mean = mean @ _inverse(self.projections[old].detach()).T
            if new in self.projections:
                mean = mean @ self.projections[new].detach().T
            self.means[new][row] = mean
        self.widths = widths


def _inverse(projection: torch.Tensor) -> torch.Tensor:
    """Return the matrix of the solution of smallest norm, without the directions of small singular values."""
    left, values, right = torch.linalg.svd(projection, full_matrices=False)
    kept = values > 0.05 * values.max()
    return (right[kept].T / values[kept]) @ left[:, kept].T


def _masked(module_tables: list[MultiLayerEmbeddingBagConfig], state: dict[str, torch.Tensor]) -> list[Masked]:
    layout = SlotLayout.of(module_tables)
    found = []
    for index, (table, widths) in enumerate(zip(module_tables, _widths(state, layout), strict=True)):
        rows = {}
        codes = _codes(state, layout)[index]
        permitted = [each.width for each in table.row_ranges or ()]
        for pool, first in zip(layout.pools, layout.first_codes().tolist(), strict=True):
            if pool.width not in permitted:
                assert not (widths == pool.width).any()
                continue
            values = torch.zeros(table.num_embeddings, pool.width, dtype=torch.float64)
            own = widths == pool.width
            values[own] = state[f"embedding_bags.rows_{pool.width}x{DIM}.weight"][codes[own] - first].double()
            rows[pool.width] = values.requires_grad_()
        projections = {
            each.width: state[name].double().clone().requires_grad_()
            for number, each in enumerate(table.row_ranges or ())
            if (name := f"projections.{table.name}:{number}.weight") in state
        }
        masked = Masked(rows, projections, widths)
        for states, weights in (
            (masked.sums, rows),
            (masked.means, rows),
            (masked.projection_sums, projections),
            (masked.projection_means, projections),
        ):
            states |= {width: torch.zeros_like(values) for width, values in weights.items()}
        found.append(masked)
    return found


def _codes(state: dict[str, torch.Tensor], layout: SlotLayout) -> list[torch.Tensor]:
    flat = state["row_slots.slots"].long().view(-1)[: layout.num_rows]
    return list(flat.split(list(layout.num_embeddings)))


def _widths(state: dict[str, torch.Tensor], layout: SlotLayout) -> list[torch.Tensor]:
    widths = torch.tensor([*(pool.width for pool in layout.pools), 0])
    pools = [torch.searchsorted(layout.first_codes(), codes, right=True) - 1 for codes in _codes(state, layout)]
    return [widths[pool] for pool in pools]


def _forward(
    tables: list[Masked], configs: list[MultiLayerEmbeddingBagConfig], bags: Bags, gradients: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the outputs; backward fills ``gradients`` with the norms of the gradients of each table's rows."""
    served = [feature for table in configs for feature in table.feature_names]
    found = {}
    for masked, table in zip(tables, configs, strict=True):
        product = masked.product()
        norms = torch.zeros(table.num_embeddings, dtype=torch.float64)
        gradients.append(norms)
        product.register_hook(partial(_note_norms, norms))
        for feature in table.feature_names:
            vectors = []
            for bag in bags[feature]:
                total = sum((weight * product[row] for row, weight in bag), 0 * product[0])
                mean = table.pooling == PoolingType.MEAN and bag
                vectors.append(total / sum(weight for _, weight in bag) if mean else total)
            found[feature if served.count(feature) == 1 else f"{feature}@{table.name}"] = torch.stack(vectors)
    return found


def _note_norms(norms: torch.Tensor, gradient: torch.Tensor) -> None:
    norms.copy_(gradient.norm(dim=1))


def _update(masked: Masked, optimizer: str, step: int) -> None:
    with torch.no_grad():
        for values, sums, means, rate, by_row in (
            *(
                (each, masked.sums[width], masked.means[width], RATES["rows"], True)
                for width, each in masked.rows.items()
            ),
            *(
                (each, masked.projection_sums[width], masked.projection_means[width], RATES["projections"], False)
                for width, each in masked.projections.items()
            ),
        ):
            gradient = values.grad
            if optimizer == "sgd":
                values -= rate * gradient
            elif optimizer == "adam":
                own = (gradient != 0).any(dim=1) if by_row else torch.ones(len(values), dtype=torch.bool)
                means[own] += 0.1 * (gradient - means)[own]
                sums[own] += 0.001 * (gradient**2 - sums)[own]
                mean, square = means / (1 - 0.9**step), sums / (1 - 0.999**step)
                values[own] -= rate * (mean / (square.sqrt() + 1e-8))[own]
            else:
                rowwise = by_row and optimizer == "rowwise_adagrad"
                sums += (gradient**2).mean(dim=1, keepdim=True) if rowwise else gradient**2
                values -= rate * gradient / (sums.sqrt() + 1e-8)
            values.grad = None


def _check_utilities(
    utilities: list[torch.Tensor], state: dict[str, torch.Tensor], layout: SlotLayout, step: int
) -> None:
    """Compare utilities after a step, and let those of the buckets that had their pass decay."""
    order = torch.tensor([layout.bucket_of_pass(number) for number in range(layout.num_buckets)])
    every = order.argsort() * MOVES.interval // layout.num_buckets
    due = (every[torch.arange(layout.num_rows) % layout.num_buckets] == (step - MOVES.warmup) % MOVES.interval) & (
        step >= MOVES.warmup
    )
    found = state["row_slots.utilities"].double().view(-1)[: layout.num_rows]
    expected = torch.cat(utilities)
    expected[due] *= MOVES.decay
    torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-6)
    start = 0
    for utility in utilities:
        utility.copy_(expected[start : start + len(utility)])
        start += len(utility)


@pytest.mark.parametrize(
    ("world_size", "optimizer", "weighted"),
    [
        (1, "adagrad", True),
        (2, "sgd", True),
        (2, "rowwise_adagrad", False),
        (3, "adagrad", False),
        (1, "adam", False),
        (2, "adam", True),
        (3, "adam", True),
    ],
)
def test_outputs_and_weights_equal_the_masked_reference_while_rows_move(
    ranks: Ranks, world_size: int, optimizer: str, weighted: bool
) -> None:
    by_rank = ranks(world_size).run(_train, optimizer, weighted)
    configs, layout = _tables(), SlotLayout.of(_tables())
    states = by_rank[0]["states"]
    tables = _masked(configs, states[0])
    utilities = [torch.zeros(table.num_embeddings, dtype=torch.float64) for table in configs]
    for step in range(STEPS):
        bags = _bags(step, weighted)
        gradients: list[torch.Tensor] = []
        expected = _forward(tables, configs, bags, gradients)
        toy_loss(expected).backward()
        for feature, values in expected.items():
            found = torch.cat([result["outputs"][step][feature] for result in by_rank])
            torch.testing.assert_close(found.double(), values.detach(), rtol=1e-4, atol=1e-5)
        for utility, gradient in zip(utilities, gradients, strict=True):
            utility += gradient
        for masked in tables:
            _update(masked, optimizer, step + 1)
        _check_utilities(utilities, states[step + 1], layout, step + 1)
        for masked, widths in zip(tables, _widths(states[step + 1], layout), strict=True):
            masked.move(widths)
    assert sum(sum(result["moved"]) for result in by_rank) > 50
    for masked, last in zip(tables, _masked(configs, states[-1]), strict=True):
        torch.testing.assert_close(last.product().detach(), masked.product().detach(), rtol=1e-4, atol=1e-5)
        for width, projection in masked.projections.items():
            torch.testing.assert_close(last.projections[width].detach(), projection.detach(), rtol=1e-4, atol=1e-5)


def _move_without_optimizer() -> str:
    meta = MultiLayerEmbeddingBagCollection(_tables(), device=torch.device("meta"), seed=3, adaptive=MOVES)
    model = shard(meta, "adam", exchange="unique_rows")
    with pytest.raises(ValueError, match="pool") as caught:
        model.module[0].move_rows()
    return str(caught.value)


def test_rows_without_a_fused_kernel_need_their_optimizer_to_move(ranks: Ranks) -> None:
    for message in ranks(2).run(_move_without_optimizer):
        assert message.startswith(f"pool 'rows_16x{DIM}': its rows have no fused kernel, as with Adam on a CPU; give")


def _roles_of_fused_states() -> list[tuple[bool, bool]]:
    meta = MultiLayerEmbeddingBagCollection(_tables(), device=torch.device("meta"), seed=3, adaptive=MOVES)
    collection = shard(meta, "sgd", exchange="unique_rows").module[0]
    params, states, local = collection.fused_optimizer.params, {}, {}
    for key, weight in params.items():
        pool, (shard_of_rows,) = key.split(".")[1], weight.local_shards()
        local[pool] = [torch.rand_like(shard_of_rows.tensor) for _ in range(2)]
        means, squares = (
            init_from_local_shards([Shard(each, shard_of_rows.metadata)], *weight.size()) for each in local[pool]
        )
        states[weight] = {f"{pool}.momentum1": means, f"{pool}.exp_avg_sq": squares, "step": torch.tensor(3)}
    collection._optim = KeyedOptimizer(params, states, [])
    return [
        (pool.means[0] is means, pool.squares[0] is squares)
        for pool, (means, squares) in (
            (pool, local[f"rows_{pool.rows.shape[1]}x{DIM}"]) for pool in collection.adaptive_tables._pools(None)
        )
    ]


def test_the_first_state_of_fused_adam_is_the_mean(ranks: Ranks) -> None:
    """TorchRec's names, as they are where fbgemm has the kernel: on CUDA."""
    assert ranks(2).run(_roles_of_fused_states) == [[(True, True)] * 3] * 2


def _initial_weights() -> dict[str, torch.Tensor]:
    meta = MultiLayerEmbeddingBagCollection(_tables(), device=torch.device("meta"), seed=3, adaptive=MOVES)
    return full_weights(shard(meta, "adagrad", exchange="unique_rows"))


def test_initial_values_do_not_depend_on_the_number_of_ranks(ranks: Ranks) -> None:
    whole = ranks(1).run(_initial_weights)[0]
    for world_size in (2, 3):
        found = ranks(world_size).run(_initial_weights)[0]
        assert found.keys() == whole.keys()
        for name, values in whole.items():
            assert torch.equal(found[name], values), name
