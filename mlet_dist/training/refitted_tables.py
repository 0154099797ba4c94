"""Start the tables of a model from tables with other rows: of other widths, in another order, or fewer of them.

Every row gets the vector that it had, as ``stored_tables.refitted_rows`` says; where the table on disk has fewer rows,
since its vocabulary has grown, the others keep their initial values. A rank reads the rows that it owns.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.utils import none_throws

from mlet_dist.checkpoint.load import MODEL_KEY, OPTIMIZER_KEY
from mlet_dist.checkpoint.manifest import Manifest
from mlet_dist.checkpoint.store import Checkpoint
from mlet_dist.checkpoint.tensor_ranges import ChunkedTensors, DcpFiles
from mlet_dist.embeddings.row_order import is_spread
from mlet_dist.embeddings.row_ranges import segments_of
from mlet_dist.embeddings.slot_layout import SlotLayout
from mlet_dist.embeddings.table_config import Segment
from mlet_dist.errors import UserError
from mlet_dist.models.build import build_collections
from mlet_dist.models.spec import ModelSpec
from mlet_dist.stored_tables.adaptive_source import AdaptiveTableSource
from mlet_dist.stored_tables.open_tables import open_factors, open_tables
from mlet_dist.stored_tables.refitted_rows import (
    RefittedRows,
    check_source,
    closest_projection,
    even_projection,
    gram_of,
)
from mlet_dist.stored_tables.table_source import TableSource, projection_name

_BLOCK_ROWS = 1 << 16
_STEP = "step"


@dataclass(frozen=True)
class _Place:
    """Rows of a part of a table, and where this rank has them.

    Attributes:
        segment: the part.
        ids: ascending ids of the table ``(n,)``.
        name: of the tensor that stores them.
        positions: theirs in this rank's part of it ``(n,)``.
    """

    segment: Segment
    ids: torch.Tensor
    name: str
    positions: torch.Tensor

    def below(self, stop: int) -> "_Place":
        """Return the part with ids below ``stop``."""
        if not len(self.ids) or int(self.ids[-1]) < stop:
            return self
        kept = int((self.ids < stop).sum())
        return replace(self, ids=self.ids[:kept], positions=self.positions[:kept])


class RefittedTables:
    """The tables of a model, filled with the rows of tables on disk.

    Args:
        spec: the model.
        sources: the tables on disk, by name, in a checkpoint.
        files: those of the checkpoint, which are closed whenever the tables have been filled.
        grown: how many rows the tables on disk have whose vocabularies have grown since, by name.

    Raises:
        UserError: a table is missing, or has other rows or vectors of another width; or the model's rows are cut into
            chunks.
    """

    def __init__(
        self,
        spec: ModelSpec,
        sources: Mapping[str, TableSource],
        files: ChunkedTensors,
        grown: Mapping[str, int] | None = None,
    ) -> None:
        collections = [each for each in build_collections(spec, torch.device("meta")) if each is not None]
        self._spec, self._sources, self._files = spec, sources, files
        tables = [table for each in collections for table in each.table_configs()]
        for table in tables:
            if table.name not in sources:
                raise UserError(f"{_location(sources)}: holds no table {table.name!r}, which the model has")
            rows = (grown or {}).get(table.name, table.num_embeddings)
            check_source(sources[table.name], rows, table.embedding_dim)
        adaptive = next((each.adaptive for each in collections if each.adaptive is not None), None)
        if adaptive is not None and adaptive.chunk_width is not None:
            raise UserError(
                f"{_location(sources)}: rows that are cut into chunks (compression.nested false) cannot begin with the "
                "rows of other settings; use compression.nested true, or policy static"
            )
        self._row_tables = {spec.rows_name(table.name): table for each in collections for table in each.row_tables()}
        ranged = [table for table in tables if table.row_ranges is not None]
        self._layout = SlotLayout.of(ranged) if adaptive is not None else None

    @classmethod
    def of_checkpoint(
        cls, spec: ModelSpec, checkpoint: Checkpoint, manifest: Manifest, grown: Mapping[str, int] | None = None
    ) -> "RefittedTables":
        """Open the tables of a checkpoint of a run, or of `mlet factorize`.

        Raises:
            UserError: as above, a tensor is missing, or the checkpoint does not say which model it is of.
        """
        about, location, prefix = manifest.about, checkpoint.location, f"{MODEL_KEY}."
        files = DcpFiles(location, checkpoint.open, manifest.files)
        if about.get("spec") is not None:
            stored = ModelSpec.from_dict(about["spec"], str(location))
            tables = open_tables(stored, files, prefix, spread=is_spread(about))
            return cls(spec, tables, files, grown)
        if "factorized" not in about:
            raise UserError(
                f"{location}: was saved by a version that did not record the model, so that its rows cannot begin a "
                "run with compression; use the export of that run, and `mlet factorize`"
            )
        return cls(spec, open_factors(about, files, prefix), files)

    @classmethod
    def of_rows_by_id(cls, checkpoint: Checkpoint, manifest: Manifest) -> "RefittedTables | None":
        """Open the tables of a checkpoint of a run whose rows are stored by id, for the same model.

        Returns:
            None if they are stored as in the model, or have slots.

        Raises:
            UserError: as for ``of_checkpoint``.
        """
        about, location = manifest.about, str(checkpoint.location)
        if is_spread(about):
            return None
        if about.get("spec") is None:
            raise UserError(
                f"{location}: does not say which model it is of; use the version of mlet_dist that saved it"
            )
        spec = ModelSpec.from_dict(about["spec"], location)
        return cls.of_checkpoint(spec, checkpoint, manifest) if has_spread_rows(spec) else None

    def check_has_states(self) -> None:
        """Raise UserError if the optimizer states on disk fit no other rows."""
        if any(isinstance(each, AdaptiveTableSource) and each.is_chunked for each in self._sources.values()):
            raise UserError(
                f"{_location(self._sources)}: its rows are cut into chunks (compression.nested false), whose optimizer "
                "state does not fit other settings; begin with its weights alone (train.initial_weights)"
            )

    @torch.no_grad()
    def load(self, model: nn.Module, states: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Fill the model's tables, and their optimizer states if given. A collective call.

        Args:
            model: the sharded model.
            states: the ``optimizer_state`` of a run that goes on; rows of adaptive tables then keep their utilities,
                too. None for a run that begins.

        Raises:
            UserError: a file is missing or damaged.
        """
        weights = model.state_dict()
        with self._files:
            refitted = self._fill_projections(weights, states or {})
            if states is not None and self._layout is not None:
                self._fill_slots(self._layout, weights)
            self._fill_steps(states or {})
            for place in self._places(weights):
                if len(place.ids):
                    rows, of_place = refitted[place.segment.name], (states or {}).get(place.name, {})
                    self._fill(place, rows, weights[place.name], of_place)
        model.load_state_dict(weights)

    def _fill(self, place: _Place, refitted: RefittedRows, weight: Any, states: Mapping[str, Any]) -> None:
        """Write the rows of a place that are on disk, and their optimizer states."""
        segment, on_disk, rows_on_disk = place.segment, refitted.source.shared_row, refitted.source.num_embeddings
        place = place.below(rows_on_disk)
        if not len(place.ids):
            return
        last = segment.first_row + segment.rows - 1
        stop = min(last + 1 + segment.shared_by, rows_on_disk)
        has_shared = segment.shared_by > 0 and int(place.ids[-1]) == last
        _write(weight, place.positions, refitted.rows(place.ids))
        if has_shared and (on_disk is None or on_disk > last):  # otherwise they read the same vector on disk
            _write(weight, place.positions[-1:], refitted.mean_row(last, stop))
        for name, state in states.items():
            if name != _STEP:
                how: dict[str, Any] = {"stored_as": partial(_state_name, name), "by_row": len(state.size()) == 1}
                _write(state, place.positions, refitted.state(place.ids, name, **how))
                if has_shared:
                    _write(state, place.positions[-1:], refitted.sum_of_states(last, stop, name, **how))

    def _fill_steps(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Fill the number of steps that Adam counts, on ranks without rows, too."""
        for name, table in self._row_tables.items():
            if _STEP in states.get(name, {}):
                source = self._sources[segments_of([table])[0].table]
                (part, *_) = source.locate(torch.zeros(1, dtype=torch.int64))
                states[name][_STEP].copy_(source.load(_state_name(_STEP, part.stored_name)))

    def _fill_projections(
        self, weights: Mapping[str, Any], states: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, RefittedRows]:
        """Fill every W2, and return the rows of each segment by name.

        A W2 is that of the same width on disk, or one that loses nothing, or least, of the vectors of its rows.
        """
        found: dict[str, RefittedRows] = {}
        for table in self._row_tables.values():
            for segment in segments_of([table]):
                source, width = self._sources[segment.table], table.row_width
                if table.hidden_dim is None:
                    found[segment.name] = RefittedRows(source, width)
                    continue
                name = projection_name(self._spec.prefix_of(table.name), segment.name)
                same_as, on_disk = source.projections.get(width, (None, None))
                if same_as is not None and on_disk is not None:
                    weights[name].copy_(on_disk)
                    for each, state in states.get(name, {}).items():
                        state.copy_(source.load(_state_name(each, same_as)))
                else:
                    self._choose_projection(source, segment, weights[name])
                found[segment.name] = RefittedRows(source, width, weights[name].detach().cpu().clone(), same_as)
        return found

    def _choose_projection(self, source: TableSource, segment: Segment, weight: torch.Tensor) -> None:
        """Fill a W2 that the table on disk does not have. Each rank reads its share of the rows."""
        width, d = weight.shape
        if width >= d:
            chosen = even_projection(weight.cpu())
        else:
            rank, ranks = dist.get_rank(), dist.get_world_size()
            begin, end = (segment.first_row + segment.rows * each // ranks for each in (rank, rank + 1))
            gram = gram_of(source, begin, min(end, source.num_embeddings)).to(weight.device)
            dist.all_reduce(gram)
            chosen = closest_projection(gram.cpu(), weight.cpu())
        weight.copy_(chosen)
        dist.broadcast(weight, src=0)  # hosts may round differently

    def _fill_slots(self, layout: SlotLayout, weights: Mapping[str, Any]) -> None:
        """Give the widest slots to the rows of the highest utility on disk, if there are any."""
        adaptive = {name: each for name, each in self._sources.items() if isinstance(each, AdaptiveTableSource)}
        if not adaptive:
            return
        start, first_rows = f"{self._spec.tables_prefix}row_slots.", layout.first_rows().tolist()
        slots, utilities = (weights[f"{start}{name}"].local_shards()[0] for name in ("slots", "utilities"))
        first = slots.metadata.shard_offsets[1]
        stop = first + slots.metadata.shard_sizes[1]
        found = torch.zeros(utilities.tensor.shape, dtype=torch.bfloat16)
        lines = max(1, _BLOCK_ROWS // (stop - first))
        for rows, block in zip(layout.rows_of(first, stop).split(lines), found.split(lines), strict=True):
            exists = rows >= 0
            numbers = rows[exists]  # ascending, so those of one table after the other
            parts = layout.parts_of(numbers)
            block[exists] = torch.cat(
                [
                    _utilities(adaptive[table], numbers[parts == part] - first_rows[part])
                    for part, table in enumerate(layout.tables)
                ]
            )

        def utility_of(rows: torch.Tensor) -> torch.Tensor:
            return found[rows // layout.num_buckets, rows % layout.num_buckets - first].float()

        slots.tensor.copy_(layout.slots_by(utility_of, first, stop))
        utilities.tensor.copy_(found)
        step = f"{start}{_STEP}"
        weights[step].copy_(adaptive[layout.tables[0]].load(f"{MODEL_KEY}.{step}"))

    def _places(self, weights: Mapping[str, Any]) -> Iterator[_Place]:
        """Yield all rows of this rank, in blocks."""
        for name, table in self._row_tables.items():
            if table.num_buckets:
                continue
            first, rows = _local_rows(weights[name])
            order = none_throws(table.row_order)
            for start in range(first, first + rows, _BLOCK_ROWS):
                ordered, positions = order.rows(start, min(start + _BLOCK_ROWS, first + rows)).sort()
                for segment in segments_of([table]):
                    begin, end = torch.searchsorted(
                        ordered, torch.tensor([segment.offset, segment.offset + segment.rows])
                    ).tolist()
                    ids = ordered[begin:end] - segment.offset + segment.first_row
                    yield _Place(segment, ids, name, positions[begin:end] + start - first)
        if self._layout is not None:
            yield from self._places_of_slots(self._layout, weights)

    def _places_of_slots(self, layout: SlotLayout, weights: Mapping[str, Any]) -> Iterator[_Place]:
        shard = weights[f"{self._spec.tables_prefix}row_slots.slots"].local_shards()[0]
        first_bucket, buckets = shard.metadata.shard_offsets[1], shard.metadata.shard_sizes[1]
        pools = {table.row_width: (name, table) for name, table in self._row_tables.items() if table.num_buckets}
        first_codes, first_rows = layout.first_codes().tolist(), layout.first_rows().tolist()
        lines = max(1, _BLOCK_ROWS // buckets)
        for start in range(0, layout.rows_per_bucket, lines):
            codes = shard.tensor[start : start + lines].cpu().long()
            line = torch.arange(start, start + len(codes)).unsqueeze(1)
            rows = line * layout.num_buckets + torch.arange(first_bucket, first_bucket + buckets)
            for pool, first_code in zip(layout.pools, first_codes, strict=True):
                name, table = pools[pool.width]
                slots = codes - first_code
                inside = (slots >= 0) & (slots < table.num_embeddings)
                numbers, positions = rows[inside], slots[inside] - first_bucket * pool.slots_per_bucket
                parts = layout.parts_of(numbers)
                for segment in table.segments:
                    part = layout.tables.index(segment.table)
                    own = parts == part
                    yield _Place(segment, numbers[own] - first_rows[part], name, positions[own])


def _utilities(source: AdaptiveTableSource, ids: torch.Tensor) -> torch.Tensor:
    """Return the utilities of rows; 0 for those that are not on disk."""
    known = source.utilities(ids[ids < source.num_embeddings])
    return torch.cat([known, known.new_zeros(len(ids) - len(known))])


def has_spread_rows(spec: ModelSpec) -> bool:
    """Return whether a model has tables whose rows are not stored by id; those of adaptive tables have slots."""
    return not spec.adaptive or any(table.name not in spec.row_ranges for table in spec.tables)


def _location(sources: Mapping[str, TableSource]) -> str:
    return next((source.location for source in sources.values()), "")


def _state_name(state: str, tensor: str) -> str:
    """Return the name of an optimizer state of a tensor of the model, both in the files."""
    return f"{OPTIMIZER_KEY}.{tensor.removeprefix(f'{MODEL_KEY}.')}.{state}"


def _local_rows(tensor: torch.Tensor | ShardedTensor) -> tuple[int, int]:
    """Return the first row of this rank's part of a tensor, and the number of its rows."""
    if not isinstance(tensor, ShardedTensor):
        return 0, tensor.shape[0]
    shards = tensor.local_shards()
    return (shards[0].metadata.shard_offsets[0], shards[0].metadata.shard_sizes[0]) if shards else (0, 0)


def _write(tensor: torch.Tensor | ShardedTensor, positions: torch.Tensor, rows: torch.Tensor) -> None:
    """Write rows to this rank's part of a tensor, of which it may have some columns only."""
    parts = [(tensor, 0)]
    if isinstance(tensor, ShardedTensor):
        parts = [(shard.tensor, shard.metadata.shard_offsets[-1]) for shard in tensor.local_shards()]
    for part, column in parts:
        values = rows if part.dim() == 1 else rows[:, column : column + part.shape[1]]
        part[positions.to(part.device)] = values.to(part.device, part.dtype)
