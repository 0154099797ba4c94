"""Compare ways of making embedding tables smaller while they train, at equal bytes, with a small DLRM in plain PyTorch.

    .venv/bin/python benchmarks/compression_arms.py --data data/criteo --policy dense --widths 16
    .venv/bin/python benchmarks/compression_arms.py --data data/criteo --policy static --widths 16 8 --budget 0.25
    .venv/bin/python benchmarks/compression_arms.py --drift 0 --policy adaptive --widths 16 8 --budget 0.25

One process trains one arm for one epoch with Adagrad (the recipe of configs/criteo_kaggle_adagrad.yaml) and prints a
line of JSON: quality on the test split, bytes in training and in serving, and the share of lookups by width. Bytes in
training are rows, W2, the optimizer's state of both and, for policies that move rows, ``--bookkeeping`` bytes a row;
the budget is a share of those of a single layer of ``--reference-dim`` columns.

Policies:

- ``dense``: all rows have the same width. A width other than d, or ``--factorised``, makes it W1·W2.
- ``static``: width ∝ (lookups in the training split)^alpha, rounded down to one of the widths or 0.
- ``random``: the widths of ``static``, dealt to random rows of the same table.
- ``adaptive``: the capacities of ``static``; every ``--interval`` steps the rows with the largest utility get them. A
  row that moves keeps its vector as well as its new width can express it (``--moved fit``).
- ``chunks``: one width, of which ``--chunks`` groups of columns are stored or not for each row, by their own utility.

Rows of width 0 read zero, or with ``--shared-rows`` rows that they share: one for each table, or some by a hash.

A row's utility is summed over steps and decays by ``--decay`` at each pass: the norm of the gradient of its vector
(``gradient``), its lookups (``count``), or their product (``count_gradient``).
"""

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from compression_data import Clicks, drifting, load
from compression_tables import Layout, Tables, allocate, drop_order, quantise, rank, served_row_bytes
from torch import nn

WARMUP_STEPS = 30
EVAL_ROWS = 4096
BITS = (32, 8, 4)


class DLRM(nn.Module):
    """DLRM without its tables: logits of dense features ``(B, num_dense)`` and vectors ``(B, tables, d)``."""

    def __init__(self, num_dense: int, num_tables: int, embedding_dim: int, divisor: int) -> None:
        super().__init__()
        vectors = num_tables + 1
        self.bottom = _mlp([num_dense, 512 // divisor, 256 // divisor, 128 // divisor, embedding_dim])
        self.top = _mlp([embedding_dim + num_tables * vectors // 2, 512 // divisor, 256 // divisor])
        self.last = nn.Linear(256 // divisor, 1)
        above = torch.triu_indices(vectors, vectors, offset=1)
        self.pairs = above[0] * vectors + above[1]

    def forward(self, dense: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """Return the logits ``(B,)``."""
        bottom = self.bottom(dense)
        every = torch.cat([bottom.unsqueeze(1), vectors], dim=1)
        products = torch.bmm(every, every.transpose(1, 2)).flatten(1)
        pairs = products.index_select(1, self.pairs)
        return self.last(self.top(torch.cat([bottom, pairs], dim=1))).squeeze(1)


def _mlp(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers)


def quality(logits: npt.NDArray[np.float64], labels: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Return AUC and LogLoss."""
    loss = np.logaddexp(0, logits) - labels * logits
    _, index, counts = np.unique(logits, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[index]
    positives = float(labels.sum())
    pairs = positives * (len(labels) - positives)
    return float((ranks[labels > 0].sum() - positives * (positives + 1) / 2) / pairs), float(loss.mean())


@torch.no_grad()
def evaluate(model: DLRM, vectors: torch.Tensor, clicks: Clicks, start: int, end: int) -> tuple[float, float]:
    """Return AUC and LogLoss of rows [start, end) with the given vectors of all ids."""
    logits = [
        model(torch.from_numpy(clicks.dense[i:j]), vectors[torch.from_numpy(clicks.ids[i:j])])
        for i, j in ((i, min(end, i + EVAL_ROWS)) for i in range(start, end, EVAL_ROWS))
    ]
    return quality(torch.cat(logits).double().numpy(), clicks.labels[start:end])


class Passes:
    """Utilities of rows or of chunks, and the passes that move columns to those with the largest.

    Args:
        args: the command line.
        layout: sizes and widths.
        tables: the tables whose rows move.
        classes: the first class of each row.
        prior: counts that rows start with, scaled at the first pass to ``--prior`` times the utility seen until then.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        layout: Layout,
        tables: Tables,
        classes: npt.NDArray[np.int64],
        prior: npt.NDArray[np.float64],
    ) -> None:
        self.args, self.layout, self.tables, self.prior = args, layout, tables, prior
        self.capacity = layout.cells(classes)
        self.chunks = args.chunks if args.policy == "chunks" else 1
        self.utility = torch.zeros(tables.rows, self.chunks)
        self.moved: list[int] = []

    def observe(self, gradient: torch.Tensor) -> None:
        """Add the utilities of one step, from the gradient of the mean loss with regard to the looked-up vectors."""
        ids, of_vectors, counts = self.tables.gradients_of_ids(gradient * len(gradient))
        if self.chunks > 1:
            w2 = self.tables.projections[0]
            table = torch.from_numpy(self.layout.table_of_row)[ids]
            of_rows = of_vectors if w2 is None else _by_row(of_vectors, table, w2)
            self.utility[ids] += of_rows.unflatten(1, (self.chunks, -1)).norm(dim=2)
            return
        norm = of_vectors.norm(dim=1)
        kinds = {"gradient": norm, "count": counts.float(), "count_gradient": norm * counts}
        self.utility[ids] += kinds[self.args.utility].unsqueeze(1)

    def run(self) -> None:
        """Move rows, or chunks, and let utilities decay."""
        if not self.moved and self.args.prior:
            share = self.args.prior * float(self.utility.sum()) / (self.prior.sum() * self.chunks)
            self.utility += torch.from_numpy(share * self.prior).float().unsqueeze(1)
        if self.chunks > 1:
            self._move_chunks()
        else:
            now = self.tables.classes[: self.tables.rows].numpy()
            utility = self.utility[:, 0].double().numpy()
            by_table = self.args.scope == "table"
            new = rank(self.layout, utility, now, self.capacity, self.args.hysteresis, by_table)
            self.moved.append(self.tables.move(new, self.args.moved))
        self.utility *= self.args.decay

    def _move_chunks(self) -> None:
        mask = self.tables.mask
        assert mask is not None
        size = mask.shape[1] // self.chunks
        now = mask[:, ::size].bool()
        score = self.utility * torch.where(now, 1 + self.args.hysteresis, 1.0)
        kept = torch.zeros(now.numel(), dtype=torch.bool)
        kept[score.flatten().topk(int(now.sum())).indices] = True
        self.moved.append(int((kept.view_as(now) & ~now).sum()))
        self.tables.mask = kept.view_as(now).float().repeat_interleave(size, dim=1)
        self.tables.weight *= self.tables.mask
        self.tables.state *= self.tables.mask


def _by_row(gradient: torch.Tensor, table: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    counts = torch.bincount(table, minlength=len(w2)).tolist()
    return torch.cat([part @ w2[t].T for t, part in enumerate(torch.split(gradient, counts))])


def first_classes(args: argparse.Namespace, clicks: Clicks, layout: Layout, budget: float) -> npt.NDArray[np.int64]:
    """Return the class of each row at the start, within ``budget`` bytes."""
    rng = np.random.default_rng([args.seed, 3])
    counts = order_of(args, clicks)
    if args.policy in ("dense", "chunks"):
        return np.zeros(len(counts), dtype=np.int64)
    classes = allocate(layout, counts, budget, args.alpha, args.policy == "adaptive" and args.scope == "all")
    if args.policy == "random" or args.start == "random":
        for start, size in zip(np.cumsum((0, *layout.sizes[:-1])), layout.sizes, strict=True):
            classes[start : start + size] = rng.permutation(classes[start : start + size])
    if args.start == "random" and args.scope == "all":
        classes = rng.permutation(classes)
    return classes


def order_of(args: argparse.Namespace, clicks: Clicks) -> npt.NDArray[np.float64]:
    """Return the counts that widths start from, made distinct."""
    counts = clicks.counts(args.early_share if args.start == "early" else 1.0)
    return counts + np.linspace(0.5, 0, len(counts), endpoint=False)


def chunk_mask(args: argparse.Namespace, clicks: Clicks, layout: Layout, budget: float) -> torch.Tensor:
    """Return which columns are stored at the start: the first chunks of a row, as many as ``static`` would give it."""
    width = layout.widths[0]
    steps = tuple(width * i // args.chunks for i in range(args.chunks, -1, -1))
    graded = Layout(layout.sizes, layout.embedding_dim, steps, (False,) * len(steps))
    fixed = int(layout.projection_bytes()[0]) * len(layout.sizes)
    classes = allocate(graded, order_of(args, clicks), budget - fixed, args.alpha, True)
    return (torch.arange(width) < torch.tensor(steps)[torch.from_numpy(classes)][:, None]).float()


def train(args: argparse.Namespace, clicks: Clicks) -> dict[str, Any]:
    """Train one arm and return what is printed."""
    began = time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    d, rows = args.embedding_dim, sum(clicks.sizes)
    widths = tuple(sorted(args.widths, reverse=True))
    factorised = (*(w != d or args.factorised for w in widths), False)
    layout = Layout(clicks.sizes, d, (*widths, 0), factorised)
    single = rows * args.reference_dim * 8
    moves = args.policy in ("adaptive", "chunks")
    shared = len(clicks.sizes) if args.shared_rows < 0 else args.shared_rows
    extra = rows * args.bookkeeping * moves + shared * d * 8
    classes = first_classes(args, clicks, layout, args.budget * single - extra)
    model = DLRM(clicks.dense.shape[1], len(clicks.sizes), d, args.mlp_divisor)  # drawn first: the same in all arms
    tables = Tables(layout, classes, args.shared_rows)
    if args.policy == "chunks":
        tables.mask = chunk_mask(args, clicks, layout, args.budget * single - extra)
        tables.weight *= tables.mask
        w2_bytes = int(layout.projection_bytes()[0]) * len(clicks.sizes)
        training_bytes = int(tables.mask.sum()) * 8 + w2_bytes + extra
    else:
        everywhere = args.policy == "adaptive" and args.scope == "all"
        training_bytes = layout.training_bytes(classes, everywhere) + extra
    optimizer = torch.optim.Adagrad(model.parameters(), lr=args.dense_rate, eps=1e-8, fused=True)
    passes = Passes(args, layout, tables, classes, order_of(args, clicks)) if moves else None
    losses = []
    for step, start in enumerate(range(0, clicks.ends[0], args.batch_size)):
        end = min(clicks.ends[0], start + args.batch_size)
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        vectors = tables.lookup(torch.from_numpy(clicks.ids[start:end])).requires_grad_()
        logits = model(torch.from_numpy(clicks.dense[start:end]), vectors)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(clicks.labels[start:end]))
        loss = loss * ((end - start) / args.batch_size)  # the incomplete last batch counts by its share
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = args.dense_rate * warmup
        optimizer.step()
        gradient = vectors.grad
        assert gradient is not None
        if passes is not None:
            passes.observe(gradient)
        tables.update(gradient, args.rate * warmup, args.dense_rate * warmup, args.rate_power)
        losses.append(loss.item())
        if passes is not None and (step + 1) % args.interval == 0:
            passes.run()
    _, valid, test = clicks.ends
    final = tables.vectors()
    auc, logloss = evaluate(model, final, clicks, valid, test)
    _, valid_logloss = evaluate(model, final, clicks, clicks.ends[0], valid)
    width = tables.width_of_class[tables.classes[:rows]].numpy()
    if tables.mask is not None:
        width = tables.mask.sum(dim=1).int().numpy()
    lookups = np.bincount(clicks.ids[valid:].ravel(), minlength=rows)
    return {
        "test_auc": auc,
        "test_logloss": logloss,
        "valid_logloss": valid_logloss,
        "progressive_logloss": float(np.mean(losses[len(losses) // 2 : -1])),
        "ceiling": clicks.ceiling,
        "training_bytes": training_bytes,
        "training_share": training_bytes / single,
        "rows_by_width": {int(w): float(np.mean(width == w)) for w in np.unique(width)},
        "lookups_by_width": {int(w): float(lookups[width == w].sum() / lookups.sum()) for w in np.unique(width)},
        "moved": passes.moved if passes is not None else [],
        "served": served(args, clicks, model, tables, width),
        "seconds": time.perf_counter() - began,
    }


def served(
    args: argparse.Namespace, clicks: Clicks, model: DLRM, tables: Tables, width: npt.NDArray[np.int64]
) -> list[dict[str, Any]]:
    """Return bytes and quality of the served tables: by form, kept share of rows, and precision.

    Forms: ``plain`` has d columns for each row that is stored; ``mixed`` keeps rows narrower than d as they are, with
    their W2 in float32; ``count`` and ``magnitude`` are plain without the rows that come last in that order
    (``--prune``), which read zero, or with ``_mean`` the mean of their table's dropped rows, weighted by their counts.
    """
    d, (_, valid, test) = tables.d, clicks.ends
    vectors, found = tables.vectors(), []
    extra = len(tables.classes) - tables.rows
    stored = int((width > 0).sum()) + extra
    for bits in BITS if args.serve else ():
        auc, logloss = evaluate(model, quantise(vectors, bits), clicks, valid, test)
        size = stored * served_row_bytes(d, bits)
        found.append({"form": "plain", "bits": bits, "bytes": size, "auc": auc, "logloss": logloss})
        if tables.mask is None and 0 < min(tables.layout.widths[:-1]) < d:
            weight, size = torch.zeros_like(tables.weight), extra * served_row_bytes(d, bits)
            cells = tables.layout.cells(tables.classes[: tables.rows].numpy())
            for c, columns in enumerate(tables.layout.widths[:-1]):
                members = torch.nonzero(tables.classes == c).flatten()
                narrow, w2 = columns < d, tables.projections[c]
                if w2 is not None and narrow:
                    size += int((cells[:, c] > 0).sum()) * columns * d * 4
                weight[members, :columns] = quantise(tables.weight[members, :columns], bits)
                size += int(cells[:, c].sum()) * served_row_bytes(min(columns, d), bits)
            auc, logloss = evaluate(model, tables.vectors(weight), clicks, valid, test)
            found.append({"form": "mixed", "bits": bits, "bytes": size, "auc": auc, "logloss": logloss})
    counts = clicks.counts()
    table = tables.layout.table_of_row
    for kind in ("count", "magnitude") if args.prune else ():
        order = drop_order(kind, counts, vectors)
        for share in args.prune:
            dropped = torch.from_numpy(np.array(order[round(share * tables.rows) :]))
            weights = torch.from_numpy(counts).float()[dropped]
            mean = torch.zeros(tables.num_tables, d).index_add_(
                0, torch.from_numpy(table)[dropped], vectors[dropped] * weights[:, None]
            )
            total = torch.zeros(tables.num_tables).index_add_(0, torch.from_numpy(table)[dropped], weights)
            mean /= total.clamp(min=1)[:, None]
            for bits in BITS:
                for form in (kind, f"{kind}_mean"):
                    kept = quantise(vectors, bits).clone()
                    kept[dropped] = mean[torch.from_numpy(table)[dropped]] if form.endswith("_mean") else 0.0
                    auc, logloss = evaluate(model, kept, clicks, valid, test)
                    size = (tables.rows - len(dropped)) * served_row_bytes(d, bits)
                    size += tables.num_tables * d * 4 if form.endswith("_mean") else 0
                    found.append(
                        {"form": form, "kept": share, "bits": bits, "bytes": size, "auc": auc, "logloss": logloss}
                    )
    return found


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("--data", type=Path, help="directory of a prepared data set")
    add("--cache", type=Path, default=Path("data/cache"), help="where its arrays are kept (default: data/cache)")
    add("--drift", type=int, metavar="SEED", help="instead of --data: a made stream in which popularity drifts")
    add("--drift-rows", type=int, default=200_000, help="length of that stream (default: 200000)")
    add("--lifetime", type=float, default=0.3, help="of a popularity rank in that stream, as a share of it")
    add("--policy", choices=["dense", "static", "random", "adaptive", "chunks"], default="dense")
    add("--budget", type=float, default=1.0, help="bytes in training, as a share of the single layer's")
    add("--widths", type=int, nargs="+", default=[16], help="the widths that a row may have, besides 0")
    add("--factorised", action="store_true", help="rows of d columns have a W2, too")
    add("--alpha", type=float, default=0.5, help="how fast widths grow with counts (default: 0.5)")
    add("--start", choices=["counts", "early", "random"], default="counts", help="the order that widths start from")
    add("--early-share", type=float, default=0.1, help="the part of the training split that `early` counts")
    add("--scope", choices=["table", "all"], default="table", help="the rows that compete with each other")
    add("--utility", choices=["gradient", "count", "count_gradient"], default="gradient")
    add("--interval", type=int, default=200, help="steps between two passes")
    add("--decay", type=float, default=0.9, help="of utilities at each pass")
    add("--hysteresis", type=float, default=0.2, help="advantage of rows that have the width in question")
    add("--prior", type=float, default=0.0, help="weight of the counts, in utilities of the first interval")
    add("--moved", choices=["fit", "reset", "reset_on_shrink"], default="fit", help="what moved rows start with")
    add("--bookkeeping", type=int, default=6, help="bytes of utility and place of a row that may move (default: 6)")
    add("--shared-rows", type=int, default=0, help="rows that those of width 0 share by a hash; -1: one for each table")
    add("--chunks", type=int, default=8, help="column groups of a row under the policy chunks")
    add("--embedding-dim", type=int, default=16, help="d (default: 16)")
    add("--reference-dim", type=int, default=16, help="columns of the single layer that budgets refer to")
    add("--rate", type=float, default=0.04, help="learning rate of rows (default: 0.04)")
    add("--rate-power", type=float, default=0.0, help="p: rows of width w learn at rate·(d/w)^p")
    add("--dense-rate", type=float, default=0.01, help="learning rate of dense layers and W2 (default: 0.01)")
    add("--mlp-divisor", type=int, default=1, help="divides the sizes of the MLPs' hidden layers, for faster runs")
    add("--batch-size", type=int, default=128)
    add("--seed", type=int, default=0)
    add("--serve", action="store_true", help="evaluate the served tables in float32, int8 and int4")
    add("--prune", type=float, nargs="*", default=[], help="evaluate the tables with these shares of rows kept")
    return found


def clicks_of(args: argparse.Namespace) -> Clicks:
    """Return the rows that the command line asks for."""
    if args.data is None:
        return drifting(args.drift, rows=args.drift_rows, lifetime=args.lifetime)
    return load(args.data, args.cache)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train one arm and print a line of JSON."""
    args = parser().parse_args(arguments)
    if (args.data is None) == (args.drift is None):
        parser().error("give --data or --drift")
    clicks = clicks_of(args)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    print(json.dumps({**settings, **train(args, clicks)}))


if __name__ == "__main__":
    main()
