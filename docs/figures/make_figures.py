"""Draw the figures of the docs and the README: ``python docs/figures/make_figures.py`` rewrites every SVG beside it.

The figures are plain SVG text, without a plotting library. Each has a background of its own, so that it reads the same
in light and dark mode, and few words in a large font, so that it reads on a phone.
"""

from __future__ import annotations

from pathlib import Path

from compression_curves import served_bytes, training_bytes
from figure import INK, MUTED, PLAIN, PROJECTION, ROWS, VECTORS, Figure

HERE = Path(__file__).resolve().parent


def overview() -> str:
    """Draw W1 · W2, the network that carries d columns, and the plain table that is served."""
    figure = Figure(
        900,
        320,
        "Training keeps W1 (n by k) sharded over the ranks and W2 (k by d) on every rank. "
        "The network carries d columns. The export multiplies both into W, a plain TorchRec table of n by d.",
    )
    figure.text(200, 38, "Training", 24, bold=True)
    top, height = 62, 200
    for rank in range(4):
        figure.box(38, top + rank * height / 4, 150, height / 4, ROWS)
        figure.text(113, top + rank * height / 4 + 32, f"rank {rank}", 20, colour=ROWS[1])
    figure.text(113, 290, "W1: n × k", 24, bold=True)
    figure.text(113, 311, "sharded by rows", 17, colour=MUTED)
    figure.text(218, 172, "·", 44, bold=True)
    figure.box(254, 87, 60, 150, PROJECTION)
    figure.text(284, 170, "W2", 22, colour=PROJECTION[1])
    figure.text(284, 290, "W2: k × d", 24, bold=True)
    figure.text(284, 311, "on every rank", 17, colour=MUTED)

    figure.text(456, 38, "Network", 24, bold=True)
    figure.arrow(360, 162, 552, 162, VECTORS[1], 5)
    for column in range(3):
        figure.box(407 + 34 * column, 102, 28, 44, VECTORS)
        figure.text(421 + 34 * column, 131, "d", 20, colour=VECTORS[1])
    figure.text(456, 199, "vectors of d columns,", 20)
    figure.text(456, 224, "not of k", 20)

    figure.line(580, 24, 580, 296)
    figure.text(740, 38, "Export and serving", 24, bold=True)
    figure.text(664, 136, "mlet export", 20)
    figure.arrow(604, 162, 724, 162, INK, 5)
    figure.text(664, 199, "W = W1 · W2", 20)
    figure.box(760, top, 60, height, VECTORS)
    figure.text(790, 170, "W", 24, colour=VECTORS[1])
    figure.text(790, 290, "W: n × d", 24, bold=True)
    figure.text(790, 311, "plain TorchRec table", 17, colour=MUTED)
    return figure.svg()


def factorization() -> str:
    """Draw one lookup: a row of W1 times W2 is a row of W."""
    figure = Figure(
        640,
        440,
        "A row of W1, k numbers, times W2 is a row of W, d numbers. Training keeps W1 and W2; serving keeps W.",
    )
    figure.text(150, 40, "W1: n × k", 24, bold=True)
    figure.text(372, 40, "W2: k × d", 24, bold=True)
    figure.text(556, 40, "W: n × d", 24, bold=True)
    figure.box(50, 60, 200, 300, ROWS)
    figure.box(50, 176, 200, 34, ("#1f6feb", "#1f6feb"))
    figure.text(150, 200, "row of id i", 20, colour="#ffffff")
    figure.text(286, 205, "·", 44, bold=True)
    figure.box(332, 92, 80, 200, PROJECTION)
    figure.text(372, 200, "W2", 24, colour=PROJECTION[1])
    figure.text(460, 204, "=", 34, bold=True)
    figure.box(516, 60, 80, 300, VECTORS)
    figure.box(516, 176, 80, 34, ("#1a7f37", "#1a7f37"))
    figure.text(556, 200, "d", 20, colour="#ffffff")
    figure.text(150, 390, "large, sharded by rows", 18, colour=MUTED)
    figure.text(372, 390, "small, on every rank", 18, colour=MUTED)
    figure.text(556, 390, "what is served", 18, colour=MUTED)
    figure.text(230, 422, "trained: n · k + k · d numbers", 20)
    figure.text(542, 422, "served: n · d", 20)
    return figure.svg()


def exchanges() -> str:
    """Draw where W2 is applied in the three exchanges of row-wise tables, and what crosses the network."""
    figure = Figure(
        640,
        1010,
        "Three exchanges of a row-wise table. after: partial sums of k columns cross the network and W2 is applied on "
        "the requesting rank. reduce_scatter: W2 is applied to the owner's partial sums, and d columns cross. "
        "unique_rows: W2 is applied to distinct rows at their owner, and each crosses once, d columns wide.",
    )
    stages = {
        "after": [
            ("look up rows,", "sum each bag", "k", ROWS),
            ("network", "reduce-scatter", "k", ROWS),
            ("apply W2", "to own bags", "d", PROJECTION),
        ],
        "reduce_scatter": [
            ("look up rows,", "sum, apply W2", "d", PROJECTION),
            ("network", "reduce-scatter", "d", VECTORS),
            ("pooled", "vectors", "d", PLAIN),
        ],
        "unique_rows": [
            ("distinct rows,", "apply W2 once", "d", PROJECTION),
            ("network", "all-to-all", "d", VECTORS),
            ("sum", "each bag", "d", PLAIN),
        ],
    }
    sent = {
        "after": "b·(R−1)·T·k values from each rank",
        "reduce_scatter": "b·(R−1)·T·d values from each rank",
        "unique_rows": "u·(R−1)/R·d values from each rank",
    }
    figure.text(111, 40, "owner rank", 20, bold=True)
    figure.text(320, 40, "network", 20, bold=True)
    figure.text(529, 40, "requesting rank", 20, bold=True)
    for index, (name, boxes) in enumerate(stages.items()):
        top = 60 + 305 * index
        if index:
            figure.line(24, top, 616, top)
        figure.text(24, top + 38, name, 26, anchor="start", bold=True)
        for position, (first, second, width, colours) in enumerate(boxes):
            left = 24 + 209 * position
            if position == 1:
                columns = 8 if width == "k" else 3
                for column in range(columns):
                    figure.box(left + 87 - 9 * columns + 18 * column, top + 70, 14, 54, colours)
                figure.text(left + 87, top + 156, f"{width} columns", 20, bold=True, colour=colours[1])
                figure.text(left + 87, top + 184, second, 18, colour=MUTED)
                figure.arrow(left - 28, top + 204, left + 202, top + 204, colours[1], 4)
            else:
                figure.box(left, top + 64, 174, 140, colours)
                figure.text(left + 87, top + 126, first, 20)
                figure.text(left + 87, top + 154, second, 20)
        figure.text(320, top + 250, sent[name], 20)
        note = {
            "after": "what composing TorchRec's parts gives",
            "reduce_scatter": "as few bytes as a plain d-dimensional table",
            "unique_rows": "fewer still where a batch repeats ids",
        }[name]
        figure.text(320, top + 280, note, 18, colour=MUTED)
    figure.text(320, 990, "b rows a rank, R ranks, T tables, u distinct ids a rank", 18, colour=MUTED)
    return figure.svg()


def life_of_a_table() -> str:
    """Draw the commands that a table passes through, from raw data to a server."""
    figure = Figure(
        640,
        790,
        "The life of a table. mlet prepare counts its vocabulary, mlet train trains W1 and W2, checkpoints hold both, "
        "mlet export writes W, mlet verify compares the two, and a TorchRec server loads W by name.",
    )
    steps = [
        ("raw logs", "CSV, TSV or Parquet", PLAIN, "mlet prepare"),
        ("data set", "values become ids 0 … n−1", PLAIN, "mlet train"),
        ("W1 (n × k) and W2 (k × d)", "trained by shards, on any number of ranks", ROWS, "every N steps"),
        ("checkpoint", "W1, W2, optimizer state, position in the data", PROJECTION, "mlet export"),
        ("W (n × d)", "plain TorchRec table: fp32, fp16, int8 or int4", VECTORS, "mlet verify"),
        ("server", "loads W by name and knows nothing of MLET", VECTORS, ""),
    ]
    for index, (name, about, colours, command) in enumerate(steps):
        top = 24 + 127 * index
        figure.box(70, top, 500, 76, colours)
        figure.text(320, top + 33, name, 23, bold=True)
        figure.text(320, top + 60, about, 19, colour=INK)
        if command:
            figure.arrow(320, top + 76, 320, top + 127, INK, 4)
            figure.text(340, top + 107, command, 20, anchor="start", colour=MUTED)
    figure.text(320, 766, "A server needs TorchRec alone, not mlet_dist.", 19, colour=MUTED)
    return figure.svg()


FIGURES = {
    "overview.svg": overview,
    "factorization.svg": factorization,
    "exchanges.svg": exchanges,
    "life_of_a_table.svg": life_of_a_table,
    "compression_training_bytes.svg": training_bytes,
    "compression_served_bytes.svg": served_bytes,
}


def main() -> None:
    """Write every figure into the directory of this script."""
    for name, draw in FIGURES.items():
        (HERE / name).write_text(draw(), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
