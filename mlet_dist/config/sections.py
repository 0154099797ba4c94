"""The settings of a training run: a frozen dataclass for each section of the config file.

The field is the only source of a setting: its type, default, limits and meaning. `mlet train --help` prints the
meanings, the documentation's reference is generated from them, and `configs/criteo_kaggle.yaml` repeats them as
comments, which a test compares with the fields (`python -m tests.helpers.annotated_config FILE` rewrites them). All
sections are in this file, rather than beside the code that they set, because the command line checks every setting
before torch is imported, and because the reference is generated from here.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mlet_dist.config.byte_sizes import ByteSize
from mlet_dist.config.parser import setting

ShardingType = Literal["row_wise", "table_row_wise", "table_wise", "data_parallel"]
ComputeKernel = Literal["fused", "fused_uvm_caching", "fused_uvm"]
ExchangeChoice = Literal["auto", "after", "reduce_scatter", "unique_rows"]
CommPrecision = Literal["fp32", "fp16", "bf16"]
RowsDtype = Literal["fp32", "fp16"]

_MAX_COLUMNS = 1 << 16
_MAX_LAYER = 10**9  # torch counts the bytes of two such layers in 64 bits
_MAX_ROWS = 2**31 - 1
_MAX_STEPS = 10**15  # its product with the batches of an epoch, and its float64, are exact
_MAX_EPOCHS = 10**9
_MAX_MINUTES, _MAX_SECONDS = 1e7, 1e7  # 19 years and 116 days: gloo counts nanoseconds in 64 bits
# What float32 holds, and the products of two of them.
_FINITE = {"above": 0, "at_least": 1e-30, "at_most": 1e30}
_SCALE = {"above": 0, "at_least": 1e-15, "at_most": 1e15}


@dataclass(frozen=True)
class DataConfig:
    """The data set to read, and how it is cut into batches."""

    path: str = setting(
        "Directory of a data set made by `mlet prepare` or `mlet synth`, or its URL (s3://…, gs://…), which needs "
        "s3fs, gcsfs or another package of fsspec."
    )
    batch_size: int = setting(
        "Rows of a global training batch, summed over all ranks; a multiple of the number of ranks.",
        128,
        at_least=1,
        at_most=_MAX_ROWS,
    )
    eval_batch_size: int = setting(
        "Rows of a global evaluation batch, summed over all ranks. It changes memory and speed, not the metrics.",
        8192,
        at_least=1,
        at_most=_MAX_ROWS,
    )
    dense_features: tuple[str, ...] | None = setting("List of the dense (numerical) columns to use; null: all.", None)
    sparse_features: tuple[str, ...] | None = setting(
        "List of the categorical columns to use, each of which has an embedding table; null: all.", None
    )
    shuffle: bool = setting(
        "true: shuffle the training rows in each epoch, by train.seed and in the same order on any number of "
        "ranks; false: read them in the order of the files, which for logs is the order of time.",
        False,
    )
    shuffle_buffer: int = setting(
        "Rows, summed over all ranks, among which data.shuffle mixes; the row groups of the files come in random "
        "order. A larger buffer mixes better and should hold two batches at least. Each rank keeps its share of two "
        "such buffers in memory.",
        1 << 18,
        at_least=1,
        at_most=_MAX_STEPS,
    )
    reader_threads: int = setting(
        "Threads of each rank that decode training rows in advance.", 2, at_least=1, at_most=1024
    )


@dataclass(frozen=True)
class ModelConfig:
    """The model: TorchRec's DLRM with multi-layer embedding tables W1·W2."""

    # fbgemm's kernels need rows whose number of columns is a multiple of 4.
    embedding_dim: int = setting(
        "d: the number of columns of the tables that are served; a multiple of 4.",
        16,
        at_least=1,
        at_most=_MAX_COLUMNS,
        multiple_of=4,
    )
    hidden_dim: int | None = setting(
        "k: the number of columns of W1 in training; a multiple of 4. The MLET paper finds values above 4 d best. "
        "null: train single-layer tables, without W2.",
        64,
        at_least=1,
        at_most=_MAX_COLUMNS,
        multiple_of=4,
    )
    bottom_mlp: tuple[int, ...] = setting(
        "Sizes of the hidden layers of DLRM's dense arch (bottom MLP). A last layer of size embedding_dim is appended.",
        (512, 256, 128),
        at_least=1,
        at_most=_MAX_LAYER,
    )
    top_mlp: tuple[int, ...] = setting(
        "Sizes of the hidden layers of DLRM's over arch (top MLP), at least one. A last layer of size 1 is appended.",
        (512, 256),
        at_least=1,
        at_most=_MAX_LAYER,
        min_length=1,
    )
    pooling: Literal["sum", "mean"] = setting(
        "sum or mean: how the vectors of a multi-valued feature's ids are pooled. A feature whose ids have weights "
        "needs sum: its vectors are multiplied by the weights and summed.",
        "sum",
    )
    rows_init: Literal["uniform", "normal"] = setting(
        "Distribution of the initial values of W1. uniform: ±1/sqrt(num_embeddings), as in DLRM; normal: mean 0 and "
        "standard deviation rows_init_std.",
        "uniform",
    )
    rows_init_std: float = setting(
        "Standard deviation of the initial values of W1 when rows_init is normal.", 0.25, **_SCALE
    )
    rows_init_gain: float = setting(
        "Factor on the initial values of W1, or of single-layer tables, under either rows_init.", 1.0, **_SCALE
    )
    projection_init_std: float | None = setting(
        "Standard deviation of the initial values of W2, which are normal. null: 1/sqrt(hidden_dim), so that W1·W2 "
        "begins at the scale of W1 (unit gain).",
        None,
        **_SCALE,
    )


@dataclass(frozen=True)
class TableCompressionConfig:
    """Limits on the widths of one table's rows. With both the same, the whole table has that width."""

    min_width: int = setting(
        "No row of this table has fewer columns; one of the widths. 0: rows may be left out.",
        0,
        at_least=0,
        at_most=_MAX_COLUMNS,
        multiple_of=4,
    )
    max_width: int | None = setting(
        "No row of this table has more columns; one of the widths. null: the largest of them.",
        None,
        at_least=4,
        at_most=_MAX_COLUMNS,
        multiple_of=4,
    )


@dataclass(frozen=True)
class CompressionConfig:
    """How tables are made smaller while they are trained, by giving rows of different frequency different widths."""

    preset: Literal["recommended", "fiited"] | None = setting(
        "Sets those settings of this section that have their default value and are not given on the command line. "
        "recommended: what the results in the documentation recommend. fiited: FIITED (arXiv:2401.04408), adaptive "
        "with nested false. null: none. A run's own config.yaml has the settings instead.",
        None,
    )
    policy: Literal["none", "static", "adaptive"] = setting(
        "none: all rows of W1 have hidden_dim columns. static: a row gets the more columns the more often the training "
        "split looks it up, and the rarest rows get none and read zero; widths are chosen before training, within "
        "budget. Ids must be sorted by descending frequency, as vocabularies are; tables are row_wise, with exchange "
        "unique_rows. adaptive: begins as static; then rows with large gradients take the place of rows with small "
        "ones, so that tables follow ids whose frequency changes over time.",
        "none",
    )
    budget: float | ByteSize = setting(
        "Bytes of the tables in training (rows, W2 and the optimizer's state, over all ranks): a size such as 12GB or "
        "4GiB (KB, MB, GB, TB: powers of 1,000; KiB, MiB, GiB, TiB: powers of 1,024), or a number, the share of those "
        "of single-layer tables of embedding_dim columns with the same optimizer.",
        0.5,
        above=0,
        at_most=1e6,
    )
    nested: bool = setting(
        "adaptive: true moves whole rows between widths. false cuts rows into chunks of equally many columns, each of "
        "which is kept or dropped by its own gradient, whatever the row's other chunks are.",
        True,
    )
    chunks: int = setting("adaptive with nested false: the number of chunks of a row.", 8, at_least=2, at_most=1024)
    widths: tuple[int, ...] | None = setting(
        "List of the widths that a row may have, besides 0; multiples of 4. null: hidden_dim, its halves down to "
        "embedding_dim, embedding_dim, and a half and a quarter of it.",
        None,
        at_least=4,
        at_most=_MAX_COLUMNS,
        multiple_of=4,
        min_length=1,
    )
    alpha: float = setting(
        "A row's width grows as its number of lookups to this power, before it is rounded down to one of the widths.",
        0.5,
        at_least=0.01,
        at_most=10,
    )
    shared_rows: bool = setting(
        "static: true lets the rows of a table that get no columns share one row of embedding_dim columns, which "
        "learns from all of them; false lets them read zero.",
        True,
    )
    interval: int = setting(
        "adaptive: steps between two passes over a row, in which it may change its width. The passes of different rows "
        "are spread over the steps.",
        1000,
        at_least=1,
        at_most=_MAX_STEPS,
    )
    warmup: int | None = setting(
        "adaptive: steps before the first pass. null: as many as interval.",
        None,
        at_least=0,
        at_most=_MAX_STEPS,
    )
    decay: float = setting(
        "adaptive: the share of a row's utility, the sum of the norms of its gradients, that is left after a pass.",
        0.5,
        at_least=0,
        at_most=1,
    )
    hysteresis: float = setting(
        "adaptive: a row keeps its width unless another row's utility is this share larger than its own.",
        0.2,
        at_least=0,
        at_most=1e6,
    )
    on_move: Literal["project", "reset"] = setting(
        "adaptive: project keeps the vector of a row that changes its width, as well as the new width can. reset makes "
        "rows that get narrower zero, as if they had been dropped.",
        "project",
    )
    tables: dict[str, TableCompressionConfig] = field(
        default_factory=dict,
        metadata={
            "meaning": "Limits on the widths of single tables, by table name: min_width and max_width. Write {C3: "
            "{min_width: 16}}, or compression.tables.C3.min_width=16 on the command line. Ids of a table whose two "
            "limits are the same need not be sorted."
        },
    )

    def limits(self, table: str) -> TableCompressionConfig:
        """Return the limits on the widths of a table's rows."""
        return self.tables.get(table, TableCompressionConfig())


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer: fused into the backward pass for W1, the same optimizer of torch for W2 and the dense layers."""

    name: Literal["sgd", "adagrad", "rowwise_adagrad", "adam"] = setting(
        "sgd, adagrad, rowwise_adagrad (one sum of squares for each row of W1, and adagrad for W2 and the dense "
        "layers) or adam (which updates only those rows of W1 that a batch looks up).",
        "sgd",
    )
    learning_rate: float = setting(
        "Learning rate of the dense layers, and of W1 and W2 where these have none of their own.", 0.2, **_FINITE
    )
    rows_learning_rate: float | None = setting(
        "Learning rate of W1, or of single-layer tables; null: optimizer.learning_rate.", None, **_FINITE
    )
    projections_learning_rate: float | None = setting(
        "Learning rate of W2; null: optimizer.learning_rate.", None, **_FINITE
    )
    warmup_steps: int = setting(
        "Number of steps at the start of the run over which all learning rates rise linearly to their values.",
        0,
        at_least=0,
        at_most=_MAX_STEPS,
    )
    decay: Literal["constant", "linear", "cosine"] = setting(
        "constant, linear or cosine: how all learning rates change after the warmup. linear and cosine fall to 0 at "
        "the end of the run; constant keeps them.",
        "constant",
    )
    decay_start: int | None = setting(
        "Step after which a linear or cosine decay begins; null: at the end of the warmup.",
        None,
        at_least=0,
        at_most=_MAX_STEPS,
    )


@dataclass(frozen=True)
class TableShardingConfig:
    """Sharding of one table; null takes the setting of the same name for all tables."""

    sharding_types: tuple[ShardingType, ...] | None = setting(
        "sharding.sharding_types for this table.", None, min_length=1
    )
    compute_kernels: tuple[ComputeKernel, ...] | None = setting(
        "sharding.compute_kernels for this table.", None, min_length=1
    )
    cache_load_factor: float | None = setting("sharding.cache_load_factor for this table.", None, above=0, below=1)
    exchange: ExchangeChoice | None = setting("sharding.exchange for this table.", None)
    rows_dtype: RowsDtype | None = setting("sharding.rows_dtype for this table.", None)


@dataclass(frozen=True)
class ShardingConfig:
    """How tables are sharded over ranks and their vectors exchanged. `mlet plan` shows the result for any hardware."""

    sharding_types: tuple[ShardingType, ...] | None = setting(
        "List of TorchRec's sharding types that the planner may give to a table; it takes the fastest one that fits "
        "in memory. row_wise: rows spread over all ranks; table_row_wise: over the ranks of one node; table_wise: the "
        "whole table on one rank; data_parallel: a copy on every rank, with all-reduced gradients. null: all four.",
        None,
        min_length=1,
    )
    compute_kernels: tuple[ComputeKernel, ...] = setting(
        "List of the kernels that the planner may use, which decide where rows are stored. fused: in device memory; "
        "fused_uvm_caching (CUDA only): in host memory, with a cache on the device; fused_uvm (CUDA only): in host "
        "memory alone. Those after the first are used where device memory cannot hold the tables.",
        ("fused",),
        min_length=1,
    )
    cache_load_factor: float = setting(
        "Share of a table's rows that fused_uvm_caching can keep in its cache on the device; between 0 and 1.",
        0.2,
        above=0,
        below=1,
    )
    data_parallel_up_to_mb: float = setting(
        "Largest size of a table's W1, in MB (10^6 bytes), with which the planner may make the table data_parallel. "
        "0: only tables with too few rows for any other type.",
        16.0,
        at_least=0,
        at_most=1e6,
    )
    exchange: ExchangeChoice = setting(
        "Where W2 is applied, which decides what crosses the network. after: after the exchange, which sends vectors "
        "of k columns; reduce_scatter: before a reduce-scatter of pooled vectors of d columns; unique_rows: before an "
        "all-to-all of distinct rows of d columns; auto: for each table, the one that sends the fewest bytes.",
        "auto",
    )
    forward_comm: CommPrecision = setting(
        "fp32, fp16 or bf16: the precision in which vectors cross the network, under every exchange. fp16 and bf16 "
        "halve the bytes; sums, W2 and all weights stay in fp32. On a single rank nothing is rounded.",
        "fp32",
    )
    backward_comm: CommPrecision = setting(
        "fp32, fp16 or bf16: the precision in which the gradients of vectors cross the network. fp16 has 3 bits more "
        "than bf16 and a narrow range: gradients are scaled by the rank's batch size for the transfer, and clamped.",
        "fp32",
    )
    rows_dtype: RowsDtype = setting(
        "fp32 or fp16: the precision in which ranks store W1 during training. fp16 halves W1, not the optimizer's "
        "state; exports are fp32. Updates of fp16 rows are rounded stochastically on CUDA, and to the nearest value "
        "on a CPU, where small updates are lost.",
        "fp32",
    )
    tables: dict[str, TableShardingConfig] = field(
        default_factory=dict,
        metadata={
            "meaning": "Settings of single tables, by table name, that replace those of this section: "
            "sharding_types, compute_kernels, cache_load_factor, exchange and rows_dtype. Write {C3: {exchange: "
            "after}}, or sharding.tables.C3.exchange=after on the command line."
        },
    )

    def of_table(self, name: str) -> TableShardingConfig:
        """Return the settings of a table: its own, and those of all tables where it has none."""
        own = self.tables.get(name, TableShardingConfig())
        keys = [each.name for each in dataclasses.fields(TableShardingConfig)]
        values = {key: getattr(own, key) if getattr(own, key) is not None else getattr(self, key) for key in keys}
        return TableShardingConfig(**values)

    def rows_dtypes(self, tables: Sequence[str]) -> dict[str, RowsDtype]:
        """Return the dtype in which the rows of each table are stored."""
        return {name: self.of_table(name).rows_dtype or self.rows_dtype for name in tables}


@dataclass(frozen=True)
class TrainConfig:
    """How long a run trains, and how it logs, saves checkpoints and handles failures."""

    seed: int = setting(
        "Seed of all initial values and of the order of shuffled rows; they do not depend on the number of ranks.",
        0,
        at_least=0,
        at_most=2**63 - 1,
    )
    epochs: int = setting("Number of passes over the training split.", 1, at_least=1, at_most=_MAX_EPOCHS)
    max_steps: int | None = setting(
        "Stop after this many steps; null: train all epochs.", None, at_least=1, at_most=_MAX_STEPS
    )
    log_every: int = setting(
        "Steps between two records in metrics.jsonl and TensorBoard.", 100, at_least=1, at_most=_MAX_STEPS
    )
    metrics_port: int | None = setting(
        "Port on which rank 0 serves these records to Prometheus, for anybody who can reach it; needs the extra "
        "`metrics`. null: none.",
        None,
        at_least=1,
        at_most=65_535,
    )
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto, cpu or cuda: the device to train on. auto: cuda where there is one, else cpu.", "auto"
    )
    on_non_finite: Literal["stop", "skip", "rollback"] = setting(
        "What happens when a loss or gradient is NaN or infinite. stop: the run ends, one step later; skip: a batch "
        "whose loss is NaN or infinite changes no weights or optimizer states on any rank, for which every step waits "
        "for the losses of all ranks, and a gradient that is NaN or infinite still ends the run; rollback: the run "
        "rolls back to its last checkpoint and continues without the batch.",
        "stop",
    )
    non_finite_limit: int = setting(
        "Number of batches that on_non_finite may leave out by skip or rollback before the run ends.",
        10,
        at_least=0,
        at_most=_MAX_STEPS,
    )
    pipelined: bool | None = setting(
        "true: use TorchRec's training pipeline, which exchanges the ids of the next batch while this one is "
        "computed; false: train one batch after the other, with the same result; null: true, but false on a single "
        "CPU rank.",
        None,
    )
    resume: str = setting(
        "auto: resume an unfinished run in run.dir from its latest complete checkpoint; never: require an empty "
        "run.dir; or the path of a checkpoint, a run or a directory of checkpoints: a run without checkpoints of its "
        "own starts from there. Settings that change what weights mean must be the same.",
        "auto",
    )
    initial_weights: str | None = setting(
        "Path of the weights that a new run takes in place of random ones at step 0: what `mlet factorize` made, a "
        "checkpoint, a run or a directory of checkpoints. The run takes all tables from it, and the dense layers "
        "where it has them; hidden_dim and all sizes must be the same. A run that resumes uses its own checkpoints. "
        "null: random initial values.",
        None,
    )
    checkpoint_every: int | None = setting(
        "Steps between two checkpoints; null: save by checkpoint_minutes alone, and at the end of the run.",
        None,
        at_least=1,
        at_most=_MAX_STEPS,
    )
    checkpoint_minutes: float | None = setting(
        "Minutes between two checkpoints; null: save by checkpoint_every alone, and at the end of the run.",
        30.0,
        above=0,
        at_most=_MAX_MINUTES,
    )
    checkpoint_dir: str | None = setting(
        "Directory or URL (s3://…) for the checkpoints of this run, and of no other; null: run.dir/checkpoints.", None
    )
    checkpoint_async: bool = setting(
        "true: write checkpoints in the background, from a copy that needs as much host memory again; false: write "
        "them while training waits.",
        True,
    )
    checkpoint_failure: Literal["stop", "continue"] = setting(
        "stop or continue: what training does when a checkpoint cannot be written, for example to a full disk. A "
        "failure to write the last checkpoint always stops it.",
        "stop",
    )
    keep_last: int = setting("Number of the latest checkpoints to keep.", 2, at_least=1, at_most=_MAX_STEPS)
    keep_every: int | None = setting(
        "Checkpoints to keep besides the latest: those whose step is a multiple of this; null: no others.",
        None,
        at_least=1,
        at_most=_MAX_STEPS,
    )
    collective_timeout_s: float = setting(
        "Seconds within which every rank must join a collective; otherwise the run ends with an error. It must be "
        "longer than anything that a rank does alone, such as reading from slow storage.",
        600.0,
        at_least=1,
        at_most=_MAX_SECONDS,
    )


@dataclass(frozen=True)
class RunConfig:
    """Where the results of the run are written."""

    dir: str = setting("Directory for the run's resolved config, metrics, TensorBoard files and checkpoints.")
    overwrite: bool = setting("true: replace a finished run in run.dir; false: refuse to.", False)
