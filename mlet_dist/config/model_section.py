"""The section `model` of a config: the network, its tables and their initial values."""

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

from mlet_dist.config.limits import MAX_COLUMNS, MAX_LAYER, MAX_ROWS, SCALE
from mlet_dist.config.parser import setting, to_yaml
from mlet_dist.config.table_settings import (
    Pooling,
    ProjectionInit,
    RowsInit,
    TableModelConfig,
    TableSettings,
    matching_entries,
)

ModelName = Literal["dlrm", "dlrm_dcn", "deepfm", "two_tower"]

NestedLoss = Literal["all", "sampled"]

_MAX_CROSS_LAYERS = 1000


@dataclass(frozen=True)
class ModelConfig:
    """The model: one of TorchRec's, or your own, around multi-layer embedding tables W1·W2."""

    name: ModelName = setting(
        "dlrm: TorchRec's DLRM. dlrm_dcn: TorchRec's DLRM_DCN, whose interaction is a low-rank cross network (DCN v2). "
        "deepfm: TorchRec's DeepFM. two_tower: the dot product of a query tower and a candidate tower.",
        "dlrm",
    )
    builder: str | None = setting(
        "package.module:function of your own, which builds the model around the tables in the place of the one that "
        "model.name says. Modules in the working directory are found too. null: none.",
        None,
    )
    arguments: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "meaning": "Settings for model.builder, by name, which it gets as they are. Write {towers: 2}, or "
            "model.arguments.towers=2 on the command line."
        },
    )

    sequences: tuple[str, ...] | None = setting(
        "List of the categorical columns whose vectors are not pooled: the network of model.builder gets a row of "
        "embedding_dim columns for each id, in the order of the list, as TorchRec's EmbeddingCollection returns them. "
        "Columns that share a table with one of them are sequences, too. null: none; all vectors are pooled.",
        None,
        min_length=1,
    )

    # fbgemm's kernels need rows whose number of columns is a multiple of 4.
    embedding_dim: int = setting(
        "d: the number of columns of the tables that are served; a multiple of 4.",
        16,
        at_least=1,
        at_most=MAX_COLUMNS,
        multiple_of=4,
    )
    nested_dims: tuple[int, ...] | None = setting(
        "List of smaller widths, ascending and multiples of 4, at which the model is trained besides embedding_dim: "
        "its first columns then make models of their own, which `mlet export --dims` writes. null: none.",
        None,
        at_least=4,
        at_most=MAX_COLUMNS,
        multiple_of=4,
        min_length=1,
    )
    nested_loss: NestedLoss = setting(
        "With nested_dims: all trains every row at all widths, by the mean of their losses; sampled trains every row "
        "at one of them, drawn from train.seed and the step, which costs no more than one width.",
        "all",
    )
    hidden_dim: int | None = setting(
        "k: the number of columns of W1 in training; a multiple of 4. The MLET paper finds values above 4 d best. "
        "null: train single-layer tables, without W2.",
        64,
        at_least=1,
        at_most=MAX_COLUMNS,
        multiple_of=4,
    )
    single_layer_up_to: int | Literal["auto"] = setting(
        "Tables of at most this number of rows are single-layer tables, whose W2 would be larger than they are. auto: "
        "hidden_dim with optimizer sgd and a W2 of unit gain, as projection_init_std null gives it; else 0, since "
        "tables without W2 would learn at another rate; and 0 with compression, which decides on W2 by itself. 0: all "
        "tables have two layers.",
        "auto",
        at_least=0,
        at_most=MAX_ROWS,
    )
    bottom_mlp: tuple[int, ...] = setting(
        "Sizes of the hidden layers of the dense arch (bottom MLP), which takes the dense columns. A last layer of "
        "size embedding_dim is appended. two_tower has none.",
        (512, 256, 128),
        at_least=1,
        at_most=MAX_LAYER,
    )
    top_mlp: tuple[int, ...] = setting(
        "Sizes of the hidden layers of the over arch (top MLP), at least one. A last layer of size 1 is appended. "
        "two_tower: sizes of all layers of each tower.",
        (512, 256),
        at_least=1,
        at_most=MAX_LAYER,
        min_length=1,
    )
    cross_layers: int = setting(
        "dlrm_dcn: the number of layers of the cross network.", 3, at_least=1, at_most=_MAX_CROSS_LAYERS
    )
    cross_rank: int = setting("dlrm_dcn: the rank of the cross network's weights.", 512, at_least=1, at_most=MAX_LAYER)
    fm_dim: int = setting(
        "deepfm: the number of outputs of the deep part of the interaction.", 16, at_least=1, at_most=MAX_LAYER
    )
    query_features: tuple[str, ...] | None = setting(
        "two_tower: list of the categorical columns of the query tower, which also takes the dense columns. The other "
        "categorical columns are those of the candidate tower.",
        None,
        min_length=1,
    )
    pooling: Pooling = setting(
        "sum or mean: how the vectors of a multi-valued feature's ids are pooled. A feature whose ids have weights "
        "needs sum: its vectors are multiplied by the weights and summed.",
        "sum",
    )
    rows_init: RowsInit = setting(
        "Distribution of the initial values of W1. uniform: ±1/sqrt(num_embeddings), as in DLRM; normal: mean 0 and "
        "standard deviation rows_init_std.",
        "uniform",
    )
    rows_init_std: float = setting(
        "Standard deviation of the initial values of W1 when rows_init is normal.", 0.25, **SCALE
    )
    rows_init_gain: float = setting(
        "Factor on the initial values of W1, or of single-layer tables, under either rows_init.", 1.0, **SCALE
    )
    projection_init: ProjectionInit = setting(
        "Distribution of the initial values of W2. normal: independent, as in the MLET paper; orthogonal: W2ᵀW2 is a "
        "multiple of the identity, so that W2 turns the gradients of vectors and scales all their directions alike.",
        "normal",
    )
    projection_init_std: float | None = setting(
        "Standard deviation of the initial values of W2. null: 1/sqrt(hidden_dim), so that W1·W2 begins at the scale "
        "of W1 (unit gain).",
        None,
        **SCALE,
    )
    tables: dict[str, TableModelConfig] = field(
        default_factory=dict,
        metadata={
            "meaning": "Settings of single tables, by name or pattern, that replace those of this section: "
            "embedding_dim, hidden_dim, pooling, rows_init, rows_init_std, rows_init_gain, projection_init and "
            "projection_init_std. "
            'Write {C3: {hidden_dim: 128}, "C1*": {hidden_dim: null}}, or model.tables.C3.hidden_dim=128 on the '
            "command line. The entry with a table's name comes before patterns, and these in order; each setting is "
            "that of the first entry that has it."
        },
    )

    @property
    def of_all_tables(self) -> TableSettings:
        """The settings of tables that have none of their own."""
        return TableSettings(**{each.name: getattr(self, each.name) for each in dataclasses.fields(TableSettings)})

    def of_table(self, name: str, num_embeddings: int) -> TableSettings:
        """Return the settings of a table of this number of rows."""
        settings = self.of_all_tables
        if num_embeddings <= self._largest_single_layer:
            settings = dataclasses.replace(settings, hidden_dim=None)
        for entry in reversed(matching_entries(self.tables, name)):
            own = {each.name: getattr(entry, each.name) for each in dataclasses.fields(entry)}
            hidden_dim = own.pop("hidden_dim")
            given = {key: value for key, value in own.items() if value is not None}
            if hidden_dim != "default":
                given["hidden_dim"] = hidden_dim
            settings = dataclasses.replace(settings, **given)
        return settings

    @property
    def _largest_single_layer(self) -> int:
        if self.single_layer_up_to != "auto":
            return self.single_layer_up_to
        if self.hidden_dim is None:
            return 0
        deviation = self.projection_init_std
        has_unit_gain = deviation is None or math.isclose(deviation * math.sqrt(self.hidden_dim), 1, rel_tol=1e-6)
        return self.hidden_dim if has_unit_gain else 0

    def single_layer(self) -> "ModelConfig":
        """Return the same with single-layer tables alone."""
        tables = {name: dataclasses.replace(each, hidden_dim="default") for name, each in self.tables.items()}
        return dataclasses.replace(self, hidden_dim=None, single_layer_up_to="auto", tables=tables)

    def sizes(self) -> Iterator[tuple[str, int, int | None]]:
        """Yield d and k that the section gives to tables, with the key of those: all, and those of an entry."""
        yield "model", self.embedding_dim, self.hidden_dim
        for name, entry in self.tables.items():
            k = self.hidden_dim if entry.hidden_dim == "default" else entry.hidden_dim
            yield f"model.tables.{name}", entry.embedding_dim or self.embedding_dim, k

    @property
    def copies_of_rows(self) -> int:
        """How many times the network gets each row of a batch: once for every width that it is trained at."""
        return 1 + len(self.nested_dims) if self.nested_dims and self.nested_loss == "all" else 1

    @property
    def has_two_layers(self) -> bool:
        """Whether the section gives some tables a W2, however small they are."""
        return any(k is not None for _, _, k in self.sizes())

    def widest_rows(self) -> tuple[str, int]:
        """Return the columns of the widest rows of W1, or of single-layer tables, after the key that sets them."""
        section, d, k = max(self.sizes(), key=lambda each: each[2] or each[1])
        return f"{section}.{'embedding_dim' if k is None else 'hidden_dim'}", k or d

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield each setting that contradicts others, and what is wrong with it, as the end of a message."""
        module, colon, function = (self.builder or "a:b").partition(":")
        if not (colon and all(part.isidentifier() for part in [*module.split("."), function])):
            yield "builder", f" is {to_yaml(self.builder)}; it is written package.module:function"
        try:
            json.dumps(self.arguments, allow_nan=False)
        except (TypeError, ValueError):
            yield "arguments", f" is {to_yaml(self.arguments)}; use text, finite numbers, true, false, null and lists"
        yield from self._nested_problems()
        if self.builder is None and self.sequences is not None:
            yield "sequences", f" is {to_yaml(list(self.sequences))}; {self.name} pools all vectors: set model.builder"
        if self.builder is None and self.name == "two_tower" and self.query_features is None:
            yield "query_features", " is null; the two_tower model needs the categorical columns of its query tower"

    def _nested_problems(self) -> Iterator[tuple[str, str]]:
        dims, d = self.nested_dims or (), self.embedding_dim
        shown = f" is {to_yaml(list(dims))}"
        if list(dims) != sorted(set(dims)):
            yield "nested_dims", f"{shown}; name each width once, in ascending order"
        if dims and dims[-1] >= d:
            yield "nested_dims", f"{shown}, which must be below model.embedding_dim {d}, a width of the model anyway"
        for name, entry in self.tables.items():
            if dims and entry.embedding_dim not in (None, d):
                yield (
                    "nested_dims",
                    f"{shown}, and model.tables.{name}.embedding_dim is {entry.embedding_dim}: widths are those of "
                    f"all tables, so all have model.embedding_dim {d} columns; leave one of the two out",
                )

    def without_effect(self) -> dict[str, list[str]]:
        """Return reason -> settings that are not their defaults and that the model does not read."""
        defaults = ModelConfig()
        if self.builder is None:
            why = f"model.name is {self.name}"
            unread = [name for of, names in _SETTINGS_OF.items() if of != self.name for name in names]
            unread += ["bottom_mlp"] * (self.name == "two_tower")
            found = {why: unread, "model.builder is null": ["arguments"]}
        else:
            found = {"model.builder is set": ["name", *(name for names in _SETTINGS_OF.values() for name in names)]}
        if self.nested_dims is None:
            found["model.nested_dims is null"] = ["nested_loss"]
        return {
            why: [name for name in names if getattr(self, name) != getattr(defaults, name)]
            for why, names in found.items()
        }


_SETTINGS_OF: dict[str, tuple[str, ...]] = {
    "dlrm_dcn": ("cross_layers", "cross_rank"),
    "deepfm": ("fm_dim",),
    "two_tower": ("query_features",),
}
"""The settings that only one of the models has."""

ONE_EMBEDDING_DIM = ("dlrm", "deepfm")
"""The models that take dot products of the vectors of all tables and of the dense columns."""

NETWORK_SETTINGS = ("name", "builder", "arguments", "sequences", *chain.from_iterable(_SETTINGS_OF.values()))
"""The settings that decide which network is around the tables, but for the sizes of its MLPs."""
