"""The config of a run: all sections, read from a YAML file with `section.key=value` overrides, and checked."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mlet_dist.config.compression_section import CompressionConfig
from mlet_dist.config.limits import MAX_CUDA_COLUMNS
from mlet_dist.config.model_section import ONE_EMBEDDING_DIM, ModelConfig
from mlet_dist.config.overrides import COMMAND_LINE, apply_override
from mlet_dist.config.parser import did_you_mean, nearest_multiples, parse_section, section_type, to_yaml
from mlet_dist.config.sections import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from mlet_dist.config.sharding_section import ShardingConfig
from mlet_dist.config.strict_yaml import load_yaml
from mlet_dist.config.table_settings import TableSettings, check_entries
from mlet_dist.config.validation_settings import check_validation_settings, metrics_to_choose_by
from mlet_dist.errors import UserError
from mlet_dist.urls import is_url


@dataclass(frozen=True)
class Config:
    """All settings of a training run. With `model.hidden_dim: null` it is the single-layer baseline."""

    data: DataConfig
    run: RunConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return plain dicts, lists and scalars, as in YAML."""
        plain: dict[str, dict[str, Any]] = yaml.safe_load(yaml.safe_dump(_plain(dataclasses.asdict(self))))
        return plain

    def warnings(self) -> list[str]:
        """Return one line for each setting that is allowed but probably not intended."""
        found = [
            f"{key}.hidden_dim {k} is below {key}.embedding_dim {d}: W1·W2 then has rank at most {k}, and by "
            f"Theorem 2.2 of the MLET paper (arXiv:2006.05623) not every table of {d} columns can be reached; "
            f"use {d} or more, preferably above {4 * d}"
            for key, d, k in self.model.sizes()
            if k is not None and k < d
        ]
        if self.data.shuffle and self.data.shuffle_buffer < 2 * self.data.batch_size:
            found.append(
                f"data.shuffle_buffer {self.data.shuffle_buffer} holds fewer than two batches of data.batch_size "
                f"{self.data.batch_size}: rows are then mixed among two batches, and neighbouring rows stay close to "
                f"each other; use {2 * self.data.batch_size} or more, preferably above {16 * self.data.batch_size}"
            )
        for why, names in self.model.without_effect().items():
            found += [f"model.{name} has no effect, because {why}" for name in names]
        if self.train.validation_share != 1 and self.train.validate_every is None:
            found.append("train.validation_share has no effect, because train.validate_every is null")
        for why, names in self.compression.without_effect().items():
            if names:
                ignored = " and ".join(f"compression.{name}" for name in names)
                value = to_yaml(getattr(self.compression, why))
                verb = "has" if len(names) == 1 else "have"
                found.append(f"{ignored} {verb} no effect, because compression.{why} is {value}")
        return found

    def check_world_size(self, world_size: int) -> None:
        """Raise UserError unless every rank gets an equal share of a training batch."""
        if self.data.batch_size % world_size:
            raise UserError(
                f"data.batch_size {self.data.batch_size} is not a multiple of the {world_size} ranks; "
                f"use {nearest_multiples(self.data.batch_size, world_size)}"
            )

    def check_device(self, device: str) -> None:
        """Raise UserError if ``device`` has no kernel for a requested width, dtype or memory of rows."""
        if device == "cuda":
            self._check_cuda_columns()
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
                    f"{prefix}rows_dtype is fp16 and optimizer.name is adam: fbgemm supports this on CUDA only; on a "
                    "CPU use rows_dtype fp32, or sgd, adagrad or rowwise_adagrad"
                )
            for kernel in kernels or ():
                if kernel != "fused":
                    raise UserError(
                        f"{prefix}compute_kernels names {kernel}, a CUDA kernel that stores rows in host memory; on a "
                        "CPU all rows are in host memory: use [fused]"
                    )

    def _check_cuda_columns(self) -> None:
        compression = self.compression
        key, columns = self.model.widest_rows()
        if compression.policy != "none" and compression.widths is not None:
            key, columns = "compression.widths", max(compression.widths)
        elif compression.policy == "adaptive" and not compression.nested:
            columns //= compression.chunks  # each chunk of a row is looked up by itself
        if columns > MAX_CUDA_COLUMNS:
            raise UserError(
                f"{key} makes rows of {columns} columns, and fbgemm's CUDA kernels support at most {MAX_CUDA_COLUMNS}; "
                f"use {MAX_CUDA_COLUMNS} or less, or train on a CPU"
            )

    def check_features(self, dense: Sequence[str], sparse: Sequence[str]) -> None:
        """Raise UserError if a feature of the config is not a column of the data set."""
        for key, wanted, known in (
            ("data.dense_features", self.data.dense_features, dense),
            ("data.sparse_features", self.data.sparse_features, sparse),
        ):
            missing = [name for name in wanted or () if name not in known]
            if missing:
                raise UserError(
                    f"{key}: {self.data.path} has no column {missing[0]!r}{did_you_mean(missing[0], known)}; "
                    f"it has {', '.join(known)}"
                )

    def check_labels(self, names: Sequence[str]) -> None:
        """Raise UserError if ``train.label_weights`` or ``train.keep_best`` do not fit the labels of the data set."""
        weights = self.train.label_weights
        if weights and len(names) == 1:
            raise UserError(f"train.label_weights: {self.data.path} has one label; leave it out")
        for name in weights:
            if name not in names:
                raise UserError(
                    f"train.label_weights: {self.data.path} has no label {name!r}{did_you_mean(name, names)}; it has "
                    f"{', '.join(names)}"
                )
        if weights and not any(weights.get(name, 1.0) for name in names):
            raise UserError("train.label_weights is 0 for all labels, so that nothing would be trained")
        metrics = metrics_to_choose_by(names)
        if self.train.keep_best is not None and self.train.keep_best not in metrics:
            near = did_you_mean(self.train.keep_best, list(metrics))
            raise UserError(
                f"train.keep_best: expected one of {', '.join(metrics)} or null, found {self.train.keep_best}{near}"
            )

    def check_tables(self, names: Sequence[str]) -> None:
        """Raise UserError if settings of single tables name a table that the model does not have."""
        for section in ("model", "sharding", "compression"):
            check_entries(f"{section}.tables", getattr(self, section).tables, names)

    def table_settings(self, num_embeddings: Mapping[str, int]) -> dict[str, TableSettings]:
        """Return the settings of every table by name, given their numbers of rows.

        Raises:
            UserError: the vectors of a table have another number of columns than the model can take.
        """
        model = self.model
        if model.single_layer_up_to == "auto" and (self.compression.policy != "none" or self.optimizer.name != "sgd"):
            model = dataclasses.replace(model, single_layer_up_to=0)
        found = {name: model.of_table(name, rows) for name, rows in num_embeddings.items()}
        dot_products = model.builder is None and model.name in ONE_EMBEDDING_DIM
        for name, each in found.items():
            if dot_products and each.embedding_dim != model.embedding_dim:
                raise UserError(
                    f"model.tables gives table {name!r} embedding_dim {each.embedding_dim}, and model.name "
                    f"{model.name} takes dot products of vectors, all of model.embedding_dim {model.embedding_dim} "
                    "columns; use dlrm_dcn or two_tower, or the same embedding_dim for all tables"
                )
        return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return list(value) if isinstance(value, tuple) else value


def load_config(path: Path, overrides: Sequence[str] = (), overrides_from: str = COMMAND_LINE) -> Config:
    """Read a YAML file, apply overrides such as ``data.batch_size=256``, and check every value.

    A leading ``~`` in a path is replaced by the home directory. Messages about an override name ``overrides_from``.

    Raises:
        UserError: the file cannot be read, or a key is unknown, missing, of the wrong type or out of range.
    """
    source = str(path)
    settings = load_yaml(path, "config")
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected sections such as `model:`, found {to_yaml(settings)}")
    sources: dict[str, str] = {}
    for override in overrides:
        apply_override(Config, settings, override, sources, overrides_from)
    _apply_preset(settings, source, sources)
    config: Config = parse_section(Config, settings, "", source, sources)
    _check_combinations(config, source, sources)
    return _with_home(config)


_PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {"policy": "static"},
    "fiited": {"policy": "adaptive", "nested": False},
}
"""The settings of ``compression.preset``."""


def _apply_preset(settings: dict[str, Any], source: str, sources: dict[str, str]) -> None:
    """Replace a known ``compression.preset`` by its settings, in place; those of the command line stay.

    It becomes their source in ``sources``.
    """
    compression = settings.get("compression")
    if not isinstance(compression, dict):
        return
    chosen = compression.get("preset")
    if not isinstance(chosen, str) or chosen not in _PRESETS:
        return  # parsing reports a name that is unknown
    defaults = CompressionConfig()
    for name, value in _PRESETS[chosen].items():
        default = getattr(defaults, name)
        if f"compression.{name}" not in sources and compression.get(name, default) == default:
            compression[name] = value
            sources[f"compression.{name}"] = f"{sources.get('compression.preset', source)}: compression.preset {chosen}"
    compression["preset"] = None


def _with_home(config: Config) -> Config:
    """Return the config with the home directory for a leading ``~`` in its paths."""

    def expanded(path: str | None) -> str | None:
        return None if path is None else os.path.expanduser(path)

    train = config.train
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=os.path.expanduser(config.data.path)),
        run=dataclasses.replace(config.run, dir=os.path.expanduser(config.run.dir)),
        train=dataclasses.replace(
            train,
            resume=os.path.expanduser(train.resume),
            initial_weights=expanded(train.initial_weights),
            checkpoint_dir=expanded(train.checkpoint_dir),
        ),
    )


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config; ``load_config`` reads the same settings back."""
    path.write_text(config_text(config), encoding="utf-8")


def config_text(config: Config) -> str:
    """Return the resolved config as YAML."""
    text: str = yaml.safe_dump(config.to_dict(), sort_keys=False)
    return text


_ONE = "leave it out, since rows move within pools that all tables share"


def _check_compression(config: Config, source: str, sources: Mapping[str, str]) -> None:
    """Raise UserError if other settings ask for what compressed tables do not support."""
    policy, sharding, model, widths = (
        config.compression.policy,
        config.sharding,
        config.model,
        config.compression.widths or (),
    )
    if policy == "none":
        return
    for name, own in config.compression.tables.items():
        if own.max_width is not None and own.min_width > own.max_width:
            key = f"compression.tables.{name}.min_width"
            raise UserError(
                f"{sources.get(key, source)}: {key} is {own.min_width}, above max_width {own.max_width} of the same "
                "table; use the same value for one width for all of its rows"
            )
    adaptive, nested = policy == "adaptive", config.compression.nested
    widest_key, largest = model.widest_rows()
    kinds = sharding.sharding_types
    for key, value, wrong, remedy in (
        ("sharding.exchange", sharding.exchange, sharding.exchange not in ("auto", "unique_rows"), "use auto"),
        ("sharding.sharding_types", kinds, kinds is not None and "row_wise" not in kinds, "add row_wise"),
        ("sharding.rows_dtype", sharding.rows_dtype, sharding.rows_dtype != "fp32", "use fp32"),
        ("sharding.tables", sorted(sharding.tables), bool(sharding.tables), "leave it out"),
        *((f"{key}.hidden_dim", k, k is not None and k < d, f"use {d} or more") for key, d, k in model.sizes()),
        *(
            (
                f"model.tables.{name}.embedding_dim",
                each.embedding_dim,
                adaptive and each.embedding_dim is not None,
                _ONE,
            )
            for name, each in model.tables.items()
        ),
        *(
            (f"model.tables.{name}.hidden_dim", each.hidden_dim, not nested and each.hidden_dim != "default", _ONE)
            for name, each in model.tables.items()
        ),
        (
            "model.single_layer_up_to",
            model.single_layer_up_to,
            not nested and model.single_layer_up_to not in ("auto", 0),
            _ONE,
        ),
        ("compression.widths", widths, len(set(widths)) < len(widths), "name each width once"),
        ("compression.nested", False, not (nested or adaptive), "use true"),
        ("compression.widths", widths, bool(widths) and not nested, "use null and compression.chunks"),
        (
            "compression.tables",
            list(config.compression.tables),
            bool(config.compression.tables) and not nested,
            "use {}",
        ),
        (
            "compression.chunks",
            config.compression.chunks,
            not nested and bool(largest % (4 * config.compression.chunks)),
            f"use a number of chunks that have 4, 8, 12, … of the {largest} columns",
        ),
        (
            "sharding.compute_kernels",  # a pass would move rows whose latest values are in the cache alone
            sharding.compute_kernels,
            adaptive and "fused_uvm_caching" in sharding.compute_kernels,
            "use fused_uvm in the place of fused_uvm_caching",
        ),
        *(
            (
                f"compression.tables.{name}.min_width",
                own.min_width,
                adaptive and bool(own.min_width),
                "use max_width alone, or policy static",
            )
            for name, own in config.compression.tables.items()
        ),
        (
            "compression.widths",
            widths,
            any(width > largest for width in widths),
            f"use widths up to {largest}, which is {widest_key}",
        ),
    ):
        if wrong:
            of_policy = sources.get("compression.policy", source)
            where = _source_of(key, value, source, sources) or of_policy
            named = policy if where == of_policy else f"{policy} ({of_policy})"
            raise UserError(
                f"{where}: {key} is {to_yaml(value)}, which does not go with compression.policy {named}; {remedy}"
            )


def _source_of(key: str, value: Any, source: str, sources: Mapping[str, str]) -> str | None:
    """Return where a setting, or a part of it, was given; None for a default, for which only others can be blamed."""
    given = next((where for name, where in sources.items() if f"{name}.".startswith(f"{key}.")), None)
    section, _, name = key.partition(".")
    setting = section_type(next(each for each in dataclasses.fields(Config) if each.name == section))
    defaults = {each.name: each.default for each in dataclasses.fields(setting)}
    return given or (None if name in defaults and defaults[name] == value else source)


def _check_combinations(config: Config, source: str, sources: Mapping[str, str]) -> None:
    """Raise UserError if settings contradict each other, or a list or path is empty."""
    for key, names in (
        ("data.dense_features", config.data.dense_features),
        ("data.sparse_features", config.data.sparse_features),
    ):
        if names is not None and (not names or len(set(names)) < len(names)):
            where = sources.get(key, source)
            raise UserError(
                f"{where}: {key} is {to_yaml(names)}; name at least one column, each once, or leave it null"
            )
    start, warmup = config.optimizer.decay_start, config.optimizer.warmup_steps
    if start is not None:
        where = sources.get("optimizer.decay_start", source)
        if config.optimizer.decay == "constant":
            raise UserError(
                f"{where}: optimizer.decay_start is {start}, but optimizer.decay is constant; use linear or cosine"
            )
        if start < warmup:
            raise UserError(
                f"{where}: optimizer.decay_start is {start}, it must be at least optimizer.warmup_steps {warmup}"
            )
    for key, text in (
        ("data.path", config.data.path),
        ("run.dir", config.run.dir),
        ("train.resume", config.train.resume),
        ("train.checkpoint_dir", "null" if config.train.checkpoint_dir is None else config.train.checkpoint_dir),
        ("train.initial_weights", "null" if config.train.initial_weights is None else config.train.initial_weights),
    ):
        if not text.strip():
            raise UserError(f"{sources.get(key, source)}: {key} is empty; it must be a directory")
    if len(set(config.run.trackers)) < len(config.run.trackers):
        raise UserError(
            f"{sources.get('run.trackers', source)}: run.trackers is {to_yaml(config.run.trackers)}; name each once"
        )
    for tag, value in config.run.tags.items():
        if not isinstance(value, str | int | float):
            key = f"run.tags.{tag}"
            raise UserError(
                f"{sources.get(key, source)}: {key} is {to_yaml(value)}; a tag is a text, a number, true or false"
            )
    for name, problem in config.model.problems():
        raise UserError(f"{sources.get(f'model.{name}', source)}: model.{name}{problem}")
    if is_url(config.run.dir):
        raise UserError(
            f"{sources.get('run.dir', source)}: run.dir is the URL {config.run.dir}, but must be a local directory; to "
            "keep checkpoints in a store, set train.checkpoint_dir to a URL"
        )
    _check_compression(config, source, sources)
    check_validation_settings(config.train, source, sources)
    if config.train.initial_weights is not None and config.train.resume not in ("auto", "never"):
        raise UserError(
            f"{sources.get('train.initial_weights', source)}: train.initial_weights is {config.train.initial_weights} "
            f"and train.resume is {config.train.resume}: a run can start from one of them only; set train.resume=auto"
        )
