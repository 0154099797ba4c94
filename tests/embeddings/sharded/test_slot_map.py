"""Long random sequences of gradients and passes: no slot is shared or lost, and rows keep their vectors."""

from collections.abc import Iterator

import pytest
import torch

from mlet_dist.embeddings import MultiLayerEmbeddingBagConfig
from mlet_dist.embeddings.row_moves import AdaptiveRows, choose_pools, least_squares_inverse
from mlet_dist.embeddings.sharded.slot_map import PoolTensors, SlotMap
from mlet_dist.embeddings.slot_layout import SlotLayout
from mlet_dist.embeddings.table_config import RowRange

DIM, CPU = 4, torch.device("cpu")
RANGES = {
    "wide": [(40, 16), (60, 8), (100, 4), (301, 0)],
    "narrow": [(50, 8), (77, 0)],
    "plain": [(30, 4)],
    "tiny": [(1, 16), (2, 0)],
}


def _layout() -> SlotLayout:
    return SlotLayout.of(
        [
            MultiLayerEmbeddingBagConfig(
                name=name,
                num_embeddings=sum(rows for rows, _ in ranges),
                embedding_dim=DIM,
                hidden_dim=16,
                feature_names=[name],
                row_ranges=[RowRange(*each) for each in ranges],
            )
            for name, ranges in RANGES.items()
        ]
    )


class _Ranks:
    """All ranks of a run in one process, with values of their own for each slot."""

    def __init__(self, world_size: int, settings: AdaptiveRows) -> None:
        layout = _layout()
        self.layout = layout
        self.ranks = [SlotMap(layout, settings, rank, world_size, CPU) for rank in range(world_size)]
        generator = torch.Generator().manual_seed(1)
        self.whole = [
            torch.rand(layout.slots(pool), each.width, generator=generator) for pool, each in enumerate(layout.pools)
        ]
        self.sums = [torch.rand(values.shape, generator=generator) for values in self.whole]
        self.projections = {
            (pool, table): torch.randn(each.width, DIM, generator=generator)
            for pool, each in enumerate(layout.pools)
            for table in self.ranks[0].segments(pool)
            if each.width != DIM
        }
        self.means = [torch.zeros_like(values) for values in self.whole]
        for pool, table, _, slots in self._groups():
            gradients = torch.randn(len(slots), DIM, generator=generator)
            projection = self.projections.get((pool, table))
            self.means[pool][slots] = gradients if projection is None else gradients @ projection.T

    def step(self, rows: torch.Tensor, gradients: torch.Tensor) -> int:
        moved = 0
        for rank in self.ranks:
            bucket = rows % self.layout.num_buckets
            own = (bucket >= rank.first_bucket) & (bucket < rank.stop_bucket)
            local = rows[own] // self.layout.num_buckets * rank.num_buckets + bucket[own] - rank.first_bucket
            assert torch.equal(rank.row_numbers(local), rows[own])
            rank.add_gradients(local, {}, gradients[own])
            rank.step += 1
            if rank.due():
                moved += rank.move_rows(rank.due(), self._pools(rank), self.projections)
        return moved

    def _pools(self, rank: SlotMap) -> list[PoolTensors]:
        found = []
        for pool, *tensors in zip(self.layout.pools, self.whole, self.sums, self.means, strict=True):
            own = slice(rank.first_bucket * pool.slots_per_bucket, rank.stop_bucket * pool.slots_per_bucket)
            values, sums, means = (tensor[own] for tensor in tensors)
            found.append(PoolTensors(values, (sums,), (means,)))
        return found

    def codes(self) -> torch.Tensor:
        return torch.cat([rank.slots for rank in self.ranks], dim=1).view(-1)

    def vectors(self) -> torch.Tensor:
        """Return the vector of each row ``(N, d)``."""
        found = torch.zeros(self.layout.num_rows, DIM)
        for pool, table, rows, slots in self._groups():
            values, projection = self.whole[pool][slots], self.projections.get((pool, table))
            found[rows] = values if projection is None else values @ projection
        return found

    def gradients(self) -> torch.Tensor:
        """Return the mean gradient of each row's vector ``(N, d)``, from that of its columns."""
        found = torch.zeros(self.layout.num_rows, DIM)
        for pool, table, rows, slots in self._groups():
            means, projection = self.means[pool][slots], self.projections.get((pool, table))
            found[rows] = means if projection is None else torch.linalg.lstsq(projection, means.T).solution.T
        return found

    def _groups(self) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
        """Yield the rows of each pool and table, with their slots."""
        codes = self.codes()[: self.layout.num_rows].long()
        pools = torch.searchsorted(self.layout.first_codes(), codes, right=True) - 1
        tables = self.layout.parts_of(torch.arange(self.layout.num_rows))
        for pool, first in enumerate(self.layout.first_codes().tolist()):
            for table in self.ranks[0].segments(pool):
                own = ((pools == pool) & (tables == table)).nonzero().squeeze(1)
                yield pool, table, own, codes[own] - first


def _check_invariants(ranks: _Ranks) -> None:
    layout, codes = ranks.layout, ranks.codes()
    assert (codes[layout.num_rows :] == -1).all()  # rows that do not exist have no slot
    taken = codes[codes >= 0].long()
    assert len(taken.unique()) == len(taken)
    first = [*layout.first_codes().tolist(), sum(layout.slots(pool) for pool in range(len(layout.pools)))]
    permitted = layout.permitted()
    rows = (codes[: layout.num_rows] >= 0).nonzero().squeeze(1)
    of_row = codes[rows].long()
    pools = torch.searchsorted(torch.tensor(first[:-1]), of_row, right=True) - 1
    assert permitted[layout.parts_of(rows), pools].all()
    sizes = torch.tensor([pool.slots_per_bucket for pool in layout.pools])
    assert torch.equal((of_row - torch.tensor(first)[pools]) // sizes[pools], rows % layout.num_buckets)


@pytest.mark.parametrize("on_move", ["project", "reset"])
def test_random_sequences_keep_slots_and_rows_consistent_on_any_number_of_ranks(on_move: str) -> None:
    settings = AdaptiveRows(interval=5, warmup=3, decay=0.6, hysteresis=0.1, on_move=on_move)  # type: ignore[arg-type]
    systems = [_Ranks(size, settings) for size in (1, 3, 24)]
    generator = torch.Generator().manual_seed(7)
    total = 0
    for step in range(60):
        rows = torch.randperm(systems[0].layout.num_rows, generator=generator)[: int(torch.randint(0, 90, ()))]
        gradients = torch.randn(len(rows), DIM, generator=generator) * 10.0 ** torch.randint(-4, 2, (len(rows), 1))
        if step == 12:
            gradients[:3] = float("nan")
        before, before_widths = (systems[0].vectors(), systems[0].gradients()), _widths(systems[0])
        moved = [ranks.step(rows, gradients) for ranks in systems]
        total += moved[0]
        for ranks in systems:
            _check_invariants(ranks)
            assert torch.equal(ranks.codes(), systems[0].codes())
        for ranks in systems[1:]:
            pairs = zip(_tensors(ranks), _tensors(systems[0]), strict=True)
            for found, expected in pairs:  # products round differently where a rank moves other numbers of rows
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        widths = _widths(systems[0])
        assert int((widths != before_widths).sum()) == moved[0]
        same = (widths >= before_widths) & (before_widths > 0) | (widths == before_widths)
        if on_move == "project":  # no width is below d
            same |= (widths > 0) & (before_widths > 0)
        for after, earlier in zip((systems[0].vectors(), systems[0].gradients()), before, strict=True):
            torch.testing.assert_close(after[same], earlier[same], rtol=1e-3, atol=1e-4)
            assert not after[(before_widths == 0) & (widths > 0)].any()
            if on_move == "reset":
                assert not after[widths < before_widths].any()
    assert total > 300


def _tensors(ranks: _Ranks) -> list[torch.Tensor]:
    return ranks.whole + ranks.sums + ranks.means


def _widths(ranks: _Ranks) -> torch.Tensor:
    layout = ranks.layout
    pools = torch.searchsorted(layout.first_codes(), ranks.codes()[: layout.num_rows].long(), right=True) - 1
    return torch.tensor([*(pool.width for pool in layout.pools), 0])[pools]


def test_the_rows_of_the_highest_utility_get_the_widest_slots() -> None:
    utility = torch.tensor([1.0, 5.0, 3.0, 4.0, 2.0, 0.0])
    permitted = torch.ones(6, 2, dtype=torch.bool)
    permitted[1, 0] = False
    nowhere, one_bucket = torch.full((6,), -1), torch.zeros(6, dtype=torch.int64)
    assert choose_pools(utility, nowhere, permitted, one_bucket, [1, 2], 0.0).tolist() == [-1, 1, 1, 0, -1, -1]
    held = torch.tensor([0, -1, -1, -1, -1, -1])
    assert choose_pools(utility, held, permitted, one_bucket, [1, 2], 3.5).tolist() == [0, 1, -1, 1, -1, -1]
    held = torch.tensor([-1, -1, 0, 1, -1, 1])
    assert choose_pools(torch.zeros(6), held, permitted, one_bucket, [1, 2], 0.0).tolist() == held.tolist()
    two_buckets = torch.tensor([0, 0, 0, 1, 1, 1])
    assert choose_pools(utility, nowhere, permitted, two_buckets, [1, 1], 0.0).tolist() == [-1, 1, 0, 0, 1, -1]


@pytest.mark.parametrize("chunk_width", [None, 8])
def test_kept_rows_are_counted_by_range_on_any_number_of_ranks(chunk_width: int | None) -> None:
    ranges = {"wide": [(30, 16), (40, 8), (90, 0)], "plain": [(35, 8), (25, 0)]}
    configs = [
        MultiLayerEmbeddingBagConfig(
            name=name,
            num_embeddings=sum(rows for rows, _ in of_table),
            embedding_dim=DIM,
            hidden_dim=16,
            feature_names=[name],
            row_ranges=[RowRange(*each) for each in of_table],
        )
        for name, of_table in ranges.items()
    ]
    layout = SlotLayout.of(configs, chunk_width)
    assert layout.row_ranges() == [(name, *each) for name, of_table in ranges.items() for each in of_table]
    of_rows = layout.num_buckets * layout.rows_per_bucket
    for size in (1, 2, 3):
        maps = [SlotMap(layout, AdaptiveRows(chunk_width=chunk_width), rank, size, CPU) for rank in range(size)]
        for each in maps:
            missing = torch.rand(each.slots.shape, generator=torch.Generator().manual_seed(each.first_bucket)) < 0.5
            each.slots[missing] = -1
        slots = torch.cat([each.slots for each in maps], dim=1)
        kept = (slots.view(-1, of_rows) >= 0).any(dim=0)[: layout.num_rows]  # rows in their order
        expected = [int(part.sum()) for part in kept.split([rows for _, rows, _ in layout.row_ranges()])]
        assert sum(each.kept_rows() for each in maps).tolist() == expected
        assert 0 < sum(expected) < layout.num_rows


def test_each_rank_has_its_share_of_the_passes_at_any_time() -> None:
    settings = AdaptiveRows(interval=6, warmup=0)
    ranks = [SlotMap(_layout(), settings, rank, 4, CPU) for rank in range(4)]
    due: list[int] = []
    for step in range(6):
        for rank in ranks:
            rank.step.fill_(step)
        of_ranks = [rank.due() for rank in ranks]
        assert max(len(each) for each in of_ranks) <= 2
        due += [bucket for each in of_ranks for bucket in each]
    assert sorted(due) == list(range(24))


def test_narrower_rows_are_the_closest_possible() -> None:
    projection = torch.randn(2, DIM, generator=torch.Generator().manual_seed(2))
    vectors = torch.randn(6, DIM, generator=torch.Generator().manual_seed(3))
    found = vectors @ least_squares_inverse(projection)
    expected = torch.linalg.lstsq(projection.T.double(), vectors.T.double()).solution.T
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_state_of_adam_moves_as_gradients_do_also_below_d() -> None:
    """Rows of 4 and 8 columns, with d = 8, exchange their slots."""
    generator = torch.Generator().manual_seed(5)
    table = MultiLayerEmbeddingBagConfig(
        name="t",
        num_embeddings=48,
        embedding_dim=8,
        hidden_dim=None,
        feature_names=["t"],
        row_ranges=[RowRange(24, 8), RowRange(24, 4)],
    )
    layout = SlotLayout.of([table])
    slots = SlotMap(layout, AdaptiveRows(interval=1, warmup=0), 0, 1, CPU)
    slots.utilities.view(-1)[24:] = 1.0
    before = slots.slots.long().view(-1)
    tensors = [[torch.rand(24, width, generator=generator) for _ in range(3)] for width in (8, 4)]
    wide, narrow = ([each.double() for each in of_pool] for of_pool in tensors)
    pools = [PoolTensors(rows, (squares,), (means,)) for rows, squares, means in tensors]
    projection = torch.randn(4, 8, generator=generator)
    assert slots.move_rows(range(24), pools, {(1, 0): projection}) == 48
    after, w2 = slots.slots.long().view(-1), projection.double()
    _, squares, means = (each[before[24:] - 24] for each in narrow)
    widened = torch.linalg.lstsq(w2, means.T).solution.T, squares.mean(dim=1, keepdim=True).expand(-1, 8) / 2
    _, squares, means = (each[before[:24]] for each in wide)
    narrowed = means @ w2.T, squares.mean(dim=1, keepdim=True).expand(-1, 4) * 2
    for pool, own, (expected_means, expected_squares) in ((0, after[24:], widened), (1, after[:24] - 24, narrowed)):
        torch.testing.assert_close(pools[pool].means[0][own].double(), expected_means, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(pools[pool].squares[0][own].double(), expected_squares, rtol=1e-5, atol=1e-6)


def test_small_gradients_are_not_lost_beside_a_large_utility() -> None:
    slots = SlotMap(_layout(), AdaptiveRows(), 0, 1, CPU)
    row = torch.tensor([17])
    slots.add_gradients(row, {}, torch.tensor([[256.0, 0.0, 0.0, 0.0]]))
    for _ in range(2000):
        slots.step += 1
        slots.add_gradients(row, {}, torch.tensor([[0.1, 0.0, 0.0, 0.0]]))  # a tenth of bfloat16's resolution there
    assert 446 < float(slots.utilities.view(-1)[17]) < 466


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(10, 8), (90, 4)], "10 rows of all tables together have 8 columns; rows that move need at least 24"),
        ([(30, 8), (90, 4), (30, 8)], "two of its row ranges have the same width"),
    ],
)
def test_tables_that_cannot_be_adaptive_are_refused(ranges: list[tuple[int, int]], message: str) -> None:
    table = MultiLayerEmbeddingBagConfig(
        name="t",
        num_embeddings=sum(rows for rows, _ in ranges),
        embedding_dim=DIM,
        hidden_dim=16,
        feature_names=["t"],
        row_ranges=[RowRange(*each) for each in ranges],
    )
    with pytest.raises(ValueError, match=message):
        SlotLayout.of([table])
    with pytest.raises(ValueError, match="24 buckets, of which 25 ranks cannot each own one"):
        _layout().first_bucket(0, 25)


def test_settings_beyond_their_limits_are_refused() -> None:
    for name, value in (("interval", 0), ("warmup", -1), ("decay", 1.5), ("hysteresis", -0.1)):
        with pytest.raises(ValueError, match=f"{name} of adaptive rows is {value}, it must be"):
            AdaptiveRows(**{name: value})  # type: ignore[arg-type]


def test_a_utility_decays_however_slowly() -> None:
    ranks = _Ranks(1, AdaptiveRows(interval=1, warmup=0, decay=0.999))
    ranks.ranks[0].utilities.fill_(100.0)
    for _ in range(500):
        ranks.step(torch.empty(0, dtype=torch.int64), torch.empty(0, DIM))
    found = ranks.ranks[0].utilities.view(-1)[: ranks.layout.num_rows].float()
    torch.testing.assert_close(found.mean(), torch.tensor(100 * 0.999**500), rtol=0.01, atol=0.0)


@pytest.mark.parametrize("rows", [400, 2_000, 14_000, 110_000])
def test_the_passes_of_a_step_are_spread_over_the_ranks(rows: int) -> None:
    table = MultiLayerEmbeddingBagConfig(
        name="t", num_embeddings=rows, embedding_dim=4, feature_names=["f"], row_ranges=[RowRange(rows, 4)]
    )
    layout, interval, world = SlotLayout.of([table]), 12, 4
    settings = AdaptiveRows(interval=interval, warmup=0)
    ranks = [SlotMap(layout, settings, rank, world, torch.device("cpu")) for rank in range(world)]
    seen: list[int] = []
    for step in range(interval):
        for rank in ranks:
            rank.step.fill_(step)
        due = [rank.due() for rank in ranks]
        seen += [bucket for of_rank in due for bucket in of_rank]
        assert max(map(len, due)) <= sum(map(len, due)) / world + 2
    assert sorted(seen) == list(range(layout.num_buckets))
