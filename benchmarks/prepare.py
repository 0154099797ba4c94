"""`mlet prepare criteo` beside two straightforward programs that do the same work: line by line, and in Polars.

    python benchmarks/prepare.py                                # on synthetic raw logs
    python benchmarks/prepare.py --raw train.tsv.gz --times 8   # on a file of yours, taken so many times over

All count C1-C26 on the first 80% of the rows, give ids by frequency, take log1p of I1-I13 and write Parquet parts of
three splits; that the rows are the same is checked. mlet prepare also looks at every line, hashes what it writes and
keeps what a restart needs. The programs take turns, and the shortest times are compared, since other jobs only add to
them. Polars is a process of its own, as mlet prepare is, takes two passes (counting, writing) in its streaming engine,
and all cores; it is left out where it is not installed (pip install "mlet-dist[bench]").
Peak memory is what all processes of mlet prepare hold, what they share counted once (PSS), on the text and on eight
times the text.
"""

import argparse
import gzip
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
BATCH_ROWS = 100_000
ROW_GROUP_ROWS = 1 << 14
DENSE, SPARSE = range(1, 14), range(14, 40)
NAMES = ("label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27)))


def lines_of(path: Path) -> Iterator[list[str]]:
    """The fields of each line."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as text:
        for line in text:
            yield line.rstrip("\n").split("\t")


def line_by_line(raw: Path, out: Path, min_count: int) -> int:
    """The same data set by dictionaries and lists; returns the number of rows."""
    rows = sum(1 for _ in lines_of(raw))
    bounds = {"train": rows * 8 // 10, "valid": rows * 9 // 10, "test": rows}
    counters: list[Counter[str]] = [Counter() for _ in SPARSE]
    for number, fields in enumerate(lines_of(raw)):
        if number == bounds["train"]:
            break
        for counter, value in zip(counters, fields[14:], strict=True):
            counter[value] += 1
    ids = []
    for counter in counters:
        kept = sorted((item for item in counter.items() if item[1] >= min_count), key=lambda item: (-item[1], item[0]))
        ids.append({value: index for index, (value, _) in enumerate(kept, start=1)})
    out.mkdir()
    log1p = math.log1p
    lines = lines_of(raw)
    types = [pa.int8(), *[pa.float32()] * 13, *[pa.int32()] * 26]
    start = 0
    for split, stop in bounds.items():
        kind = pa.schema(list(zip(NAMES, types, strict=True)))
        with pq.ParquetWriter(out / f"{split}.parquet", kind, compression="zstd", write_page_checksum=True) as writer:
            while start < stop:
                columns: list[list[float]] = [[] for _ in NAMES]
                for _ in range(min(BATCH_ROWS, stop - start)):
                    fields = next(lines)
                    columns[0].append(int(fields[0]))
                    for index in DENSE:
                        value = fields[index]
                        columns[index].append(log1p(max(int(value), 0)) if value else 0.0)
                    for index in SPARSE:
                        columns[index].append(ids[index - 14].get(fields[index], 0))
                start += len(columns[0])
                arrays = [pa.array(column, kind) for column, kind in zip(columns, types, strict=True)]
                writer.write_table(pa.table(arrays, schema=kind), row_group_size=ROW_GROUP_ROWS)
    return rows


def by_polars(raw: Path, out: Path, min_count: int) -> None:
    """The same data set by lazy frames; a .gz is decompressed by Polars."""
    import polars

    kind = dict(zip(NAMES, [polars.Int8, *[polars.Int64] * 13, *[polars.String] * 26], strict=True))
    lines = polars.scan_csv(raw, separator="\t", has_header=False, schema=kind, quote_char=None)
    lines = lines.with_columns(polars.col(polars.String).fill_null(""))
    rows = lines.select(polars.len()).collect(engine="streaming").item()
    bounds = (0, rows * 8 // 10, rows * 9 // 10, rows)
    train = lines.head(bounds[1])
    counts = polars.collect_all(
        [
            train.group_by(name)
            .len()
            .filter(polars.col("len") >= min_count)
            .sort(["len", name], descending=[True, False])
            for name in NAMES[14:]
        ],
        engine="streaming",
    )
    ids = [
        polars.col(name).replace_strict(
            found[name], polars.int_range(1, len(found) + 1, eager=True), default=0, return_dtype=polars.Int32
        )
        for name, found in zip(NAMES[14:], counts, strict=True)
    ]
    dense = [
        polars.col(name).fill_null(0).clip(0).cast(polars.Float64).log1p().cast(polars.Float32) for name in NAMES[1:14]
    ]
    encoded = lines.with_columns(dense + ids)
    out.mkdir()
    for split, (start, stop) in zip(("train", "valid", "test"), pairwise(bounds), strict=True):
        part = encoded.slice(start, stop - start)
        part.sink_parquet(out / f"{split}.parquet", compression="zstd", row_group_size=ROW_GROUP_ROWS)


def seconds_of_polars(raw: Path, out: Path) -> float:
    """Of a process that does the work, from its start."""
    command = [sys.executable, __file__, "--polars", str(raw), str(out)]
    started = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - started


def prepare(raw: Path, out: Path, processes: int | None) -> tuple[float, int, dict[str, float], int]:
    """Seconds of a whole `mlet prepare`, rows, seconds of each pass, and the peak of its processes' PSS in bytes."""
    command = [sys.executable, "-m", "mlet_dist", "prepare", "criteo", str(raw), "--out", str(out), "--json"]
    command += [] if processes is None else ["--processes", str(processes)]
    started, peak = time.perf_counter(), 0
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, pss_of_tree(process.pid))
            time.sleep(0.05)
        elapsed = time.perf_counter() - started
        stdout, stderr = process.communicate()
    if process.returncode:
        sys.exit(stderr)
    passes = {}
    for line in stderr.splitlines():  # such as `read 1,000/1,000 bytes  500 bytes/s`
        words = line.replace(",", "").split()
        if len(words) >= 5 and words[0] in ("read", "count", "vocabulary", "write"):
            passes[words[0]] = float(words[1].split("/")[0]) / max(float(words[3]), 1e-9)
    return elapsed, sum(json.loads(stdout.splitlines()[-1])["rows"].values()), passes, peak


def pss_of_tree(root: int) -> int:
    """Bytes of a process and those below it, what they share divided by the number of sharers; 0 without /proc."""
    total, waiting = 0, [root]
    while waiting:
        pid = waiting.pop()
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) << 10
            for task in Path(f"/proc/{pid}/task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
    return total


def assert_same(ours: Path, theirs: Path) -> None:
    """Stop unless both wrote the same rows."""
    for split in ("train", "valid", "test"):
        found = pa.concat_tables([pq.read_table(path) for path in sorted((ours / split).iterdir())])
        expected = pq.read_table(theirs / f"{split}.parquet")
        if not found.cast(expected.schema).equals(expected):  # ours are declared to hold no null
            sys.exit(f"{ours.name} and {theirs.name} hold different rows of {split}")


def repeated(raw: Path, out: Path, times: int) -> Path:
    """A file with the text of ``raw`` so many times, compressed as it is."""
    with out.open("wb") as sink:
        for _ in range(times):
            with raw.open("rb") as source:
                shutil.copyfileobj(source, sink)
    return out


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, help="a raw Criteo log, plain or .gz (default: a synthetic one)")
    parser.add_argument("--rows", type=int, default=150_000, help="rows of the synthetic log (default %(default)s)")
    parser.add_argument("--times", type=int, default=4, help="how often its text is taken (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each program (default %(default)s)")
    parser.add_argument("--processes", type=int, help="of mlet prepare (default: all cores)")
    parser.add_argument("--memory", action="store_true", help="measure memory on 1 and 8 times the text too")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--polars", nargs=2, type=Path, metavar=("RAW", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.polars:
        by_polars(*args.polars, min_count=2)
        return
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        home = Path(folder)
        source = args.raw
        if source is None:
            command = ["synth", "--out", str(home / "raw"), "--rows", str(args.rows), "--format", "tsv"]
            subprocess.run([sys.executable, "-m", "mlet_dist", *command], cwd=ROOT, check=True, capture_output=True)
            [source] = (home / "raw").iterdir()
        raw = repeated(source, home / f"raw{source.suffix}", args.times)
        seconds: dict[str, list[float]] = {"ours": [], "line_by_line": []}
        if find_spec("polars"):
            seconds["polars"] = []
        passes: dict[str, float] = {}
        rows = 0
        for _ in range(args.repeats):
            for name in seconds:
                shutil.rmtree(home / name, ignore_errors=True)
            elapsed, rows, passes, _ = prepare(raw, home / "ours", args.processes)
            seconds["ours"].append(elapsed)
            started = time.perf_counter()
            line_by_line(raw, home / "line_by_line", min_count=2)
            seconds["line_by_line"].append(time.perf_counter() - started)
            if "polars" in seconds:
                seconds["polars"].append(seconds_of_polars(raw, home / "polars"))
            for name in [*seconds][1:]:
                assert_same(home / "ours", home / name)
            print(", ".join(f"{name} {rows / each[-1]:,.0f} rows/s" for name, each in seconds.items()))
        best = {name: min(each) for name, each in seconds.items()}
        result = {
            "rows": rows,
            "cores": len(os.sched_getaffinity(0)),
            "pass_seconds": {name: round(each, 2) for name, each in passes.items()},
            "load_average": os.getloadavg()[0],
        }
        if args.memory:
            for times in (1, 8):
                shutil.rmtree(home / "ours", ignore_errors=True)
                text = repeated(source, home / f"memory{source.suffix}", times * args.times)
                result[f"peak_mb_{times}x"] = prepare(text, home / "ours", args.processes or 2)[3] >> 20
        if "polars" in best:
            result["polars_rows_per_s"] = round(rows / best["polars"])
            result["over_polars"] = round(best["polars"] / best["ours"], 2)
        result["rows_per_s"] = round(rows / best["ours"])
        result["over_line_by_line"] = round(best["line_by_line"] / best["ours"], 2)
    print("  ".join(f"{name} {value}" for name, value in result.items()))
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
