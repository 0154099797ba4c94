"""Rows cut into chunks that come and go, against a dense float64 reference with masks."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed as dist

from mlet_dist.embeddings import MultiLayerEmbeddingBagCollection, MultiLayerEmbeddingBagConfig
from mlet_dist.embeddings.row_moves import AdaptiveRows
from mlet_dist.embeddings.slot_layout import SlotLayout
from mlet_dist.embeddings.table_config import RowRange
from tests.helpers.dense_reference import Bags, toy_loss
from tests.helpers.ranks import RankPool
from tests.helpers.sharded_module import optimizer_of, record_steps, shard, to_kjt

pytestmark = pytest.mark.multirank

RATES = {"rows": 0.05, "projections": 0.02}
STEPS, GLOBAL_BATCH, DIM, CHUNK = 7, 24, 8, 4
MOVES = AdaptiveRows(interval=2, warmup=1, decay=0.5, hysteresis=0.1, chunk_width=CHUNK)


def _tables() -> list[MultiLayerEmbeddingBagConfig]:
    ranges = {"wide": [(20, 16), (30, 8), (40, 4), (60, 0)], "single": [(30, 8), (40, 4), (50, 0)]}
    return [
        MultiLayerEmbeddingBagConfig(
            name=name,
            num_embeddings=sum(rows for rows, _ in of_table),
            embedding_dim=DIM,
            hidden_dim=16 if name == "wide" else None,
            feature_names=[f"f_{name}"],
            row_ranges=[RowRange(*each) for each in of_table],
        )
        for name, of_table in ranges.items()
    ]


def _bags(step: int) -> Bags:
    draw = random.Random(step)

    def row(n: int) -> int:
        return int(n * draw.random() ** 3 + step * n / 5) % n

    return {
        table.feature_names[0]: [
            [(row(table.num_embeddings), 1.0) for _ in range(draw.randint(0, 3))] for _ in range(GLOBAL_BATCH)
        ]
        for table in _tables()
    }


def _train() -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    first, last = rank * GLOBAL_BATCH // world, (rank + 1) * GLOBAL_BATCH // world
    meta = MultiLayerEmbeddingBagCollection(_tables(), device=torch.device("meta"), seed=3, adaptive=MOVES)
    model = shard(meta, "sgd", exchange="unique_rows")
    batches = (to_kjt(_bags(step), first, last) for step in range(STEPS))
    return record_steps(model, optimizer_of(model, "sgd", RATES), batches)


def _masks(state: dict[str, torch.Tensor], layout: SlotLayout) -> list[torch.Tensor]:
    """Return for each table which columns its rows have, ``(n, k)``."""
    present = (state["row_slots.slots"].view(layout.num_chunks, -1)[:, : layout.num_rows] >= 0).double()
    of_tables = present.split(list(layout.num_embeddings), dim=1)
    return [
        of_table[: table.row_width // CHUNK].t().repeat_interleave(CHUNK, dim=1)
        for of_table, table in zip(of_tables, _tables(), strict=True)
    ]


def _layers(state: dict[str, torch.Tensor], layout: SlotLayout) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return W1, with zeros where a row has no columns, and W2 of each table."""
    codes = state["row_slots.slots"].long().view(layout.num_chunks, -1)[:, : layout.num_rows]
    pool = torch.cat([state[f"embedding_bags.chunks_{CHUNK}x{DIM}.weight"], torch.zeros(1, CHUNK)]).double()
    found = []
    for of_table, table in zip(codes.split(list(layout.num_embeddings), dim=1), _tables(), strict=True):
        chunks = range(table.row_width // CHUNK)
        rows = torch.cat([pool[of_table[chunk]] for chunk in chunks], dim=1)
        projections = [state.get(f"projections.{table.name}:{chunk}.weight") for chunk in chunks]
        whole = torch.eye(DIM) if projections[0] is None else torch.cat(projections)  # type: ignore[arg-type]
        found.append((rows, whole.double()))
    return found


def _check_utilities(
    utilities: list[torch.Tensor], state: dict[str, torch.Tensor], layout: SlotLayout, step: int
) -> None:
    """Compare utilities after a step, and let those of the buckets that had their pass decay."""
    found = state["row_slots.utilities"].double().view(layout.num_chunks, -1)[:, : layout.num_rows]
    order = [layout.bucket_of_pass(number) for number in range(layout.num_buckets)]
    row = 0
    for utility in utilities:
        buckets = torch.arange(row, row + utility.shape[1]) % layout.num_buckets
        passes = torch.tensor(order).argsort()[buckets] * MOVES.interval // layout.num_buckets
        utility[:, (passes == (step - MOVES.warmup) % MOVES.interval) & (step >= MOVES.warmup)] *= MOVES.decay
        own = found[: len(utility), row : row + utility.shape[1]]
        torch.testing.assert_close(own, utility, rtol=0.02, atol=1e-6)
        row += utility.shape[1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_outputs_and_weights_equal_the_masked_reference(ranks: Callable[[int], RankPool], world_size: int) -> None:
    by_rank = ranks(world_size).run(_train)
    layout, states = SlotLayout.of(_tables(), CHUNK), by_rank[0]["states"]
    layers = [tuple(each.requires_grad_() for each in pair) for pair in _layers(states[0], layout)]
    masks = _masks(states[0], layout)
    utilities = [torch.zeros(table.row_width // CHUNK, table.num_embeddings).double() for table in _tables()]
    for step in range(STEPS):
        outputs, products = {}, []
        for table, (rows, projection), mask in zip(_tables(), layers, masks, strict=True):
            products.append((rows * mask) @ projection)
            products[-1].retain_grad()
            outputs[table.feature_names[0]] = torch.stack(
                [
                    sum((products[-1][row] for row, _ in bag), 0 * products[-1][0])
                    for bag in _bags(step)[table.feature_names[0]]
                ]
            )
        toy_loss(outputs).backward()
        for feature, expected in outputs.items():
            found = torch.cat([result["outputs"][step][feature] for result in by_rank])
            torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            for utility, product, (rows, projection), table in zip(utilities, products, layers, _tables(), strict=True):
                for chunk, of_chunk in enumerate(projection.split(CHUNK)):
                    utility[chunk] += (product.grad @ of_chunk.t()).norm(dim=1)
                rows -= RATES["rows"] * rows.grad
                if table.hidden_dim is not None:
                    projection -= RATES["projections"] * projection.grad
                rows.grad = projection.grad = None
            _check_utilities(utilities, states[step + 1], layout, step + 1)
            after = _masks(states[step + 1], layout)
            for (rows, _), mask, before in zip(layers, after, masks, strict=True):
                rows[(mask > 0) & (before == 0)] = 0  # a new chunk begins at zero
            masks = after
    assert sum(sum(result["moved"]) for result in by_rank) > 50
    for (rows, projection), mask, (last, of_last) in zip(layers, masks, _layers(states[-1], layout), strict=True):
        torch.testing.assert_close(last, (rows * mask).detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(of_last, projection.detach(), rtol=1e-4, atol=1e-6)
    slots = layout.slots(0)
    for state in states:
        codes = state["row_slots.slots"]
        taken = codes[codes >= 0]
        assert len(taken.unique()) == len(taken) <= slots
