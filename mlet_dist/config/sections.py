"""Settings: frozen dataclasses <- YAML <- `section.key=value` overrides. Every check of a setting lives here."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from mlet_dist.config.parser import closest, multiples
from mlet_dist.config.parser import setting as _setting
from mlet_dist.errors import UserError

_SHOWN_CHARACTERS = 200
_MAX_COLUMNS = 1 << 16
_MAX_ROWS = 2**31 - 1


@dataclass(frozen=True)
class DataConfig:
    """Which data set is read, and in what batches."""

    path: str = _setting(
        "directory of a data set made by `mlet prepare` or `mlet synth`, or its URL (s3://…; needs s3fs, gcsfs, …)"
    )
    batch_size: int = _setting(
        "rows of a global training batch, a multiple of the world size", 128, at_least=1, at_most=_MAX_ROWS
    )
    eval_batch_size: int = _setting("rows of a global evaluation batch", 8192, at_least=1, at_most=_MAX_ROWS)
    dense_features: tuple[str, ...] | None = _setting("dense columns to use; null takes all", None)
    sparse_features: tuple[str, ...] | None = _setting("categorical columns to use; null takes all", None)
    shuffle: bool = _setting("mix the training rows anew in each epoch, by train.seed; false keeps their order", False)
    shuffle_buffer: int = _setting(
        "rows of all ranks together among which shuffle mixes, of row groups in random order", 1 << 18, at_least=1
    )
    reader_threads: int = _setting("threads of a rank that decode training rows ahead", 2, at_least=1)


@dataclass(frozen=True)
class ModelConfig:
    """TorchRec's DLRM around multi-layer embedding tables."""

    # fbgemm's kernels take rows of a multiple of 4 columns.
    embedding_dim: int = _setting(
        "d: columns of the tables that are served, a multiple of 4",
        16,
        at_least=1,
        at_most=_MAX_COLUMNS,
        multiple_of=4,
    )
    hidden_dim: int | None = _setting(
        "k: columns of W1 in training, a multiple of 4; null trains single-layer tables",
        64,
        at_least=1,
        at_most=_MAX_COLUMNS,
        multiple_of=4,
    )
    bottom_mlp: tuple[int, ...] = _setting(
        "hidden layers of the dense arch; d is appended", (512, 256, 128), at_least=1
    )
    top_mlp: tuple[int, ...] = _setting(
        "hidden layers of the over arch, one or more; 1 is appended", (512, 256), at_least=1, min_length=1
    )
    pooling: Literal["sum", "mean"] = _setting(
        "how the vectors of a multi-valued feature's ids become one; those with weights are summed", "sum"
    )
    rows_init: Literal["uniform", "normal"] = _setting(
        "W1: uniform ±1/sqrt(num_embeddings), or N(0, rows_init_std^2)", "uniform"
    )
    rows_init_std: float = _setting("standard deviation of W1 when rows_init is normal", 0.25, above=0)
    rows_init_gain: float = _setting("factor on the initial values of the rows", 1.0, above=0)
    projection_init_std: float | None = _setting(
        "standard deviation of W2; null means 1/sqrt(hidden_dim), unit gain", None, above=0
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """One optimizer for everything: fused into backward for rows, the matching torch optimizer elsewhere."""

    name: Literal["sgd", "adagrad", "rowwise_adagrad", "adam"] = _setting(
        "sgd, adagrad, rowwise_adagrad (one sum a row; adagrad for the rest) or adam (moves only rows looked up)",
        "sgd",
    )
    learning_rate: float = _setting("of the dense layers, and of what has none of its own", 0.2, above=0)
    rows_learning_rate: float | None = _setting(
        "of W1, or of single-layer tables; null takes learning_rate", None, above=0
    )
    projections_learning_rate: float | None = _setting("of W2; null takes learning_rate", None, above=0)
    warmup_steps: int = _setting("first steps, over which all three rates rise linearly", 0, at_least=0)
    decay: Literal["constant", "linear", "cosine"] = _setting(
        "how all three rates fall afterwards, to 0 at the end of the run; constant keeps them", "constant"
    )
    decay_start: int | None = _setting(
        "step after which they fall; null begins when warmup_steps are done", None, at_least=0
    )


RowsDtype = Literal["fp32", "fp16"]


@dataclass(frozen=True)
class TableShardingConfig:
    """What `sharding` says of one table alone; null takes what is said of all."""

    sharding_types: tuple[Literal["row_wise", "table_row_wise", "table_wise", "data_parallel"], ...] | None = _setting(
        "as sharding.sharding_types", None, min_length=1
    )
    compute_kernels: tuple[Literal["fused", "fused_uvm_caching", "fused_uvm"], ...] | None = _setting(
        "as sharding.compute_kernels", None, min_length=1
    )
    cache_load_factor: float | None = _setting("as sharding.cache_load_factor", None, above=0, below=1)
    exchange: Literal["auto", "after", "reduce_scatter", "unique_rows"] | None = _setting("as sharding.exchange", None)
    rows_dtype: Literal["fp32", "fp16"] | None = _setting("as sharding.rows_dtype", None)


@dataclass(frozen=True)
class ShardingConfig:
    """How tables are spread over ranks, and how their vectors cross the network."""

    sharding_types: tuple[Literal["row_wise", "table_row_wise", "table_wise", "data_parallel"], ...] | None = _setting(
        "which of row_wise, table_row_wise, table_wise, data_parallel the planner may give a table; null: all",
        None,
        min_length=1,
    )
    compute_kernels: tuple[Literal["fused", "fused_uvm_caching", "fused_uvm"], ...] = _setting(
        "where the planner may keep rows: fused (on the device), fused_uvm_caching (in the host's memory, a cache of "
        "them on the device), fused_uvm (in the host's memory alone); the last two on CUDA",
        ("fused",),
        min_length=1,
    )
    cache_load_factor: float = _setting(
        "share of a table's rows that fused_uvm_caching keeps on the device", 0.2, above=0, below=1
    )
    data_parallel_up_to_mb: float = _setting(
        "MB (10^6 bytes) of a table's rows up to which the planner may hold it on every rank",
        16.0,
        at_least=0,
        at_most=1e6,
    )
    exchange: Literal["auto", "after", "reduce_scatter", "unique_rows"] = _setting(
        "W2 after the exchange (k columns cross the network), before a reduce-scatter, or on distinct rows before an "
        "all-to-all (d columns); auto takes the one that sends fewer bytes, table by table",
        "auto",
    )
    forward_comm: Literal["fp32", "fp16", "bf16"] = _setting(
        "what vectors are rounded to on the network, under every exchange; nothing is on one rank", "fp32"
    )
    backward_comm: Literal["fp32", "fp16", "bf16"] = _setting(
        "what their gradients are rounded to there; fp16 sends them scaled up by the rank's batch", "fp32"
    )
    rows_dtype: Literal["fp32", "fp16"] = _setting(
        "how ranks store W1 in training; fp16 halves it, not the optimizer's state; exports are fp32", "fp32"
    )
    tables: dict[str, TableShardingConfig] = field(
        default_factory=dict,
        metadata={
            "meaning": "by table, what differs there of sharding_types, compute_kernels, cache_load_factor, exchange, "
            "rows_dtype: {C3: {exchange: after}}, or sharding.tables.C3.exchange=after"
        },
    )

    def of_table(self, name: str) -> TableShardingConfig:
        """What holds for a table: its own settings, and those of all where it has none."""
        own = self.tables.get(name, TableShardingConfig())
        keys = [each.name for each in dataclasses.fields(TableShardingConfig)]
        values = {key: getattr(own, key) if getattr(own, key) is not None else getattr(self, key) for key in keys}
        return TableShardingConfig(**values)

    def rows_dtypes(self, tables: Sequence[str]) -> dict[str, RowsDtype]:
        """How the rows of each table are stored."""
        return {name: self.of_table(name).rows_dtype or self.rows_dtype for name in tables}


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, and what to say meanwhile."""

    seed: int = _setting("fixes all initial values, and the order of shuffled rows", 0, at_least=0, at_most=2**63 - 1)
    epochs: int = _setting("passes over the training split", 1, at_least=1)
    max_steps: int | None = _setting("stop after this many steps; null trains all epochs", None, at_least=1)
    log_every: int = _setting("steps between two records in metrics.jsonl and TensorBoard", 100, at_least=1)
    device: Literal["auto", "cpu", "cuda"] = _setting("auto takes cuda where there is one", "auto")
    on_non_finite: Literal["stop", "skip", "rollback"] = _setting(
        "what a loss or gradient that is not finite does: stop ends the run; skip leaves out the batch, for its loss "
        "alone, and every step waits for all ranks' losses; rollback goes back to the last checkpoint and leaves out "
        "the batch",
        "stop",
    )
    non_finite_limit: int = _setting("batches that a run may so leave out before it ends", 10, at_least=0)
    pipelined: bool | None = _setting(
        "exchange the ids of the next batch behind the compute of this one; null does, but on a single CPU rank", None
    )
    resume: str = _setting(
        "auto goes on from the newest whole checkpoint of an unfinished run in run.dir; never wants an empty run.dir; "
        "or a checkpoint, a run or a directory of checkpoints, from which a run without any of its own begins",
        "auto",
    )
    initial_weights: str | None = _setting(
        "what `mlet factorize` made, or a checkpoint, a run or a directory of checkpoints, whose tables, and dense "
        "layers where it has them, a run takes in place of random ones at step 0",
        None,
    )
    checkpoint_every: int | None = _setting(
        "steps between two checkpoints; null saves by the clock, and at the end", None, at_least=1
    )
    checkpoint_minutes: float | None = _setting(
        "minutes between two checkpoints; null saves by steps, and at the end", 30.0, above=0
    )
    checkpoint_dir: str | None = _setting(
        "directory or URL (s3://…) for checkpoints, of this run alone; null is run.dir/checkpoints", None
    )
    checkpoint_async: bool = _setting(
        "write checkpoints behind training, from a copy in the host's memory; false writes them while training waits",
        True,
    )
    checkpoint_failure: Literal["stop", "continue"] = _setting(
        "what a checkpoint that cannot be written does to training; the last one always stops it", "stop"
    )
    keep_last: int = _setting("checkpoints to keep: the last so many", 2, at_least=1)
    keep_every: int | None = _setting("and those whose step is a multiple of this; null: no others", None, at_least=1)
    collective_timeout_s: float = _setting(
        "seconds in which every rank must take part in a collective, before the run ends with an error", 600.0, above=0
    )


@dataclass(frozen=True)
class RunConfig:
    """Where the run is written."""

    dir: str = _setting("directory for the resolved config, metrics and checkpoints")
    overwrite: bool = _setting("replace a finished run in that directory", False)


@dataclass(frozen=True)
class Config:
    """Everything a training run is told; `model.hidden_dim: null` is the single-layer baseline."""

    data: DataConfig
    run: RunConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain dicts, lists and scalars, as in YAML."""
        plain: dict[str, dict[str, Any]] = yaml.safe_load(yaml.safe_dump(_plain(dataclasses.asdict(self))))
        return plain

    def warnings(self) -> list[str]:
        """Settings that are possible but that the user should know of, one line each."""
        k, d = self.model.hidden_dim, self.model.embedding_dim
        found = []
        if k is not None and k < d:
            found.append(
                f"model.hidden_dim {k} is below model.embedding_dim {d}: W1·W2 then has rank at most {k}, and by "
                "Theorem 2.2 of the MLET paper (arXiv:2006.05623) not every table of d columns can be reached; "
                f"use {d} or more, best over {4 * d}"
            )
        if self.data.shuffle and self.data.shuffle_buffer < 2 * self.data.batch_size:
            found.append(
                f"data.shuffle_buffer {self.data.shuffle_buffer} holds fewer than two batches of data.batch_size "
                f"{self.data.batch_size}: two are mixed all the same, which leaves neighbours nearly together; use "
                f"{2 * self.data.batch_size} or more, best over {16 * self.data.batch_size}"
            )
        return found

    def check_world_size(self, world_size: int) -> None:
        """Raise UserError unless every rank gets an equal share of a training batch."""
        if self.data.batch_size % world_size:
            raise UserError(
                f"data.batch_size {self.data.batch_size} is not a multiple of the {world_size} ranks; "
                f"use {multiples(self.data.batch_size, world_size)}"
            )

    def check_device(self, device: str) -> None:
        """Raise UserError where there is no kernel for what is asked of rows on ``device``."""
        if device != "cpu":
            return
        sharding = self.sharding
        for prefix, dtype, kernels in [
            ("sharding.", sharding.rows_dtype, sharding.compute_kernels),
            *(
                (f"sharding.tables.{name}.", own.rows_dtype, own.compute_kernels)
                for name, own in sharding.tables.items()
            ),
        ]:
            if self.optimizer.name == "adam" and dtype == "fp16":
                raise UserError(
                    f"{prefix}rows_dtype is fp16 and optimizer.name is adam: fbgemm updates such rows on CUDA alone; "
                    "on a CPU use fp32, or sgd, adagrad or rowwise_adagrad"
                )
            for kernel in kernels or ():
                if kernel != "fused":
                    raise UserError(
                        f"{prefix}compute_kernels names {kernel}, which keeps rows of CUDA kernels in the host's "
                        "memory; on a CPU all rows are there: use [fused]"
                    )

    def check_features(self, dense: Sequence[str], sparse: Sequence[str]) -> None:
        """Raise UserError where a feature that is asked for is not among the data set's."""
        for key, wanted, known in (
            ("data.dense_features", self.data.dense_features, dense),
            ("data.sparse_features", self.data.sparse_features, sparse),
        ):
            missing = [name for name in wanted or () if name not in known]
            if missing:
                raise UserError(
                    f"{key}: {self.data.path} has no column {missing[0]!r}{closest(missing[0], known)}; "
                    f"it has {', '.join(known)}"
                )

    def check_tables(self, names: Sequence[str]) -> None:
        """Raise UserError where ``sharding.tables`` names a table that the model lacks."""
        for name in self.sharding.tables:
            if name not in names:
                raise UserError(
                    f"sharding.tables: the model has no table {name!r}{closest(name, names)}; it has {', '.join(names)}"
                )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return list(value) if isinstance(value, tuple) else value
