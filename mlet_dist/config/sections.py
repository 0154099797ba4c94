"""The settings of a training run: a frozen dataclass for each section of the config file.

The field is the only source of a setting: its type, default, limits and meaning. `mlet train --help` prints the
meanings, the documentation's reference is generated from them, and `configs/criteo_kaggle.yaml` repeats them as
comments, which a test compares with the fields (`python -m tests.helpers.annotated_config FILE` rewrites them). The
sections `model`, `compression` and `sharding` have files of their own. None is beside the code that it sets, because
the command line checks every setting before torch is imported.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from mlet_dist.config.limits import MAX_ROWS, MAX_STEPS
from mlet_dist.config.parser import setting

Precision = Literal["fp32", "tf32", "bf16"]
"""In which dense layers and W2 compute while they train."""

TrackerName = Literal["tensorboard", "mlflow", "wandb"]

_MAX_EPOCHS = 10**9
_MAX_MINUTES, _MAX_SECONDS = 1e7, 1e7  # 19 years and 116 days: gloo counts nanoseconds in 64 bits
# What float32 holds.
_FINITE = {"above": 0, "at_least": 1e-30, "at_most": 1e30}


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
        at_most=MAX_ROWS,
    )
    eval_batch_size: int = setting(
        "Rows of a global evaluation batch, summed over all ranks. It changes memory and speed, not the metrics.",
        8192,
        at_least=1,
        at_most=MAX_ROWS,
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
        at_most=MAX_STEPS,
    )
    reader_threads: int = setting(
        "Threads of each rank that decode training rows in advance.", 2, at_least=1, at_most=1024
    )


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
        "Learning rate of W2; null: optimizer.learning_rate; 0: W2 keeps its initial values.",
        None,
        at_least=0,
        at_most=_FINITE["at_most"],
    )
    warmup_steps: int = setting(
        "Number of steps at the start of the run over which all learning rates rise linearly to their values.",
        0,
        at_least=0,
        at_most=MAX_STEPS,
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
        at_most=MAX_STEPS,
    )


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
        "Stop after this many steps; null: train all epochs.", None, at_least=1, at_most=MAX_STEPS
    )
    log_every: int = setting(
        "Steps between two records in metrics.jsonl and TensorBoard.", 100, at_least=1, at_most=MAX_STEPS
    )
    metrics_port: int | None = setting(
        "Port on which rank 0 serves these records to Prometheus, for anybody who can reach it; needs the extra "
        "`metrics`. null: none.",
        None,
        at_least=1,
        at_most=65_535,
    )
    label_weights: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "meaning": "With several labels, the factors of their losses in the sum that is trained, by label; 1 for "
            "those that are not named. Write {conversion: 0.5}, or train.label_weights.conversion=0.5 on the command "
            "line.",
            "at_least": 0,
            "at_most": 1e6,
        },
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
        at_most=MAX_STEPS,
    )
    pipelined: bool | None = setting(
        "true: use TorchRec's training pipeline, which exchanges the ids of the next batch while this one is "
        "computed; false: train one batch after the other, with the same result; null: true, but false on a single "
        "CPU rank.",
        None,
    )
    precision: Precision = setting(
        "fp32, tf32 or bf16: the precision in which the dense layers and W2 compute in training. tf32 rounds the "
        "factors of matrix products to 10 bits for the tensor cores of NVIDIA GPUs; most CPUs compute in fp32 then. "
        "bf16 computes forward and backward with 7 bits (autocast). Weights, optimizer states, losses, rows, what "
        "crosses the network and evaluation are fp32 in any case, unless other settings say otherwise.",
        "fp32",
    )
    compile: bool = setting(
        "true: compile the dense layers by torch.compile, which takes up to some minutes at the start of a job and "
        "changes results by rounding; needs a C++ compiler. Evaluation is not compiled. false: do not.",
        False,
    )
    deterministic: bool = setting(
        "true: use algorithms with a fixed order of additions on CUDA, which are slower, so that a run can be repeated "
        "and resumed bitwise; an operation without such an algorithm is an error. CPUs need no such setting. false: "
        "use the fastest algorithms.",
        False,
    )
    resume: str = setting(
        "auto: resume an unfinished run in run.dir from its latest complete checkpoint; never: require an empty "
        "run.dir; or the path of a checkpoint, a run or a directory of checkpoints: a run without checkpoints of its "
        "own starts from there. Settings that change what weights mean must be the same, but for those of compression. "
        "With other training data it takes weights and optimizer state, and starts at step 0.",
        "auto",
    )
    initial_weights: str | None = setting(
        "Path of the weights that a new run takes in place of random ones at step 0: what `mlet factorize` made, a "
        "checkpoint, a run or a directory of checkpoints. The run takes all tables from it, and the dense layers "
        "where it has them; all sizes must be the same (hidden_dim may differ if either has compression), but tables "
        "may have grown (`mlet prepare --grow`). A run that resumes uses its own checkpoints. null: random initial "
        "values.",
        None,
    )
    checkpoint_every: int | None = setting(
        "Steps between two checkpoints; null: save by checkpoint_minutes alone, and at the end of the run.",
        None,
        at_least=1,
        at_most=MAX_STEPS,
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
        "true: write checkpoints in the background, from a copy that needs as much host memory again; false, or where "
        "that memory is missing: write them while training waits.",
        True,
    )
    checkpoint_failure: Literal["stop", "continue"] = setting(
        "stop or continue: what training does when a checkpoint cannot be written, for example to a full disk. A "
        "failure to write the last checkpoint always stops it.",
        "stop",
    )
    keep_last: int = setting("Number of the latest checkpoints to keep.", 2, at_least=1, at_most=MAX_STEPS)
    keep_every: int | None = setting(
        "Checkpoints to keep besides the latest: those whose step is a multiple of this; null: no others.",
        None,
        at_least=1,
        at_most=MAX_STEPS,
    )
    validate_every: int | Literal["epoch"] | None = setting(
        "Steps between two validations on the split valid while the run trains, or epoch: one after each epoch; one "
        "more follows the last step. null: evaluate at the end of the run alone. Weights do not depend on it.",
        None,
        at_least=1,
        at_most=MAX_STEPS,
    )
    validation_share: float = setting(
        "Share of the rows of valid that these validations take, from its beginning. The evaluation at the end of the "
        "run takes all of them.",
        1.0,
        above=0,
        at_most=1,
    )
    keep_best: str | None = setting(
        "auc or logloss: the checkpoint with the highest AUC or the lowest LogLoss of all validations is kept besides "
        "those of keep_last and keep_every, for `--best` of other commands; needs validate_every. With several labels "
        "it is that of the first, or of the one that is named, as in click_auc. null: none is kept.",
        None,
    )
    patience: int | None = setting(
        "Stop the run after this many validations in a row none of which was better than the best before them, by "
        "keep_best, which it needs; null: take all steps.",
        None,
        at_least=1,
        at_most=MAX_STEPS,
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
    trackers: tuple[TrackerName, ...] = setting(
        "List of what shows the records of metrics.jsonl: tensorboard (files in run.dir), mlflow (needs the extra "
        "`mlflow` and MLFLOW_TRACKING_URI) and wandb (the extra `wandb`). Addresses, experiments and credentials come "
        "from the environment. A tracker that fails never stops training.",
        ("tensorboard",),
    )
    tags: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "meaning": "Tags of the run in mlflow and wandb, by name: texts, numbers, true or false. Write "
            "{team: ads}, or run.tags.team=ads on the command line."
        },
    )
