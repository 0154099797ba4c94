"""Compare `mlet prepare criteo` with two simple programs that do the same work, one line by line and one in Polars.

    python benchmarks/prepare.py                                # on synthetic raw logs
    python benchmarks/prepare.py --raw train.tsv.gz --times 8   # on your own file, repeated 8 times

All three count C1-C26 on the first 80% of the rows, assign ids by frequency, take log1p of I1-I13 and write the
Parquet files of three splits. The benchmark checks that they write the same rows. `mlet prepare` also validates every
line, computes checksums of its output, and keeps what it needs to resume. The programs take turns, and the shortest
times are compared, since other processes can only make them longer.

Polars runs in its own process, as `mlet prepare` does, with two passes (counting, writing) of its streaming engine on
all cores. It is skipped if it is not installed (pip install ".[bench]"). Peak memory is that of all processes
of `mlet prepare`, with shared pages counted once (PSS), for the text and for eight times the text.
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
    """Yield the fields of each line."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as text:
        for line in text:
            yield line.rstrip("\n").split("\t")


def line_by_line(raw: Path, out: Path, min_count: int) -> int:
    """Prepare the same data set with dictionaries and lists; return the number of rows."""
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
    """Prepare the same data set with lazy frames of Polars, which also decompresses a .gz file."""
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
    """Return the seconds of a process that runs ``by_polars``, from its start."""
    command = [sys.executable, __file__, "--polars", str(raw), str(out)]
    started = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - started


def prepare(raw: Path, out: Path, processes: int | None) -> tuple[float, int, dict[str, float], int]:
    """Run `mlet prepare`; return its seconds, its rows, the seconds of each pass, and the peak PSS in bytes."""
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
    """Return the PSS in bytes of a process and its descendants; 0 without /proc."""
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
    """Exit with an error unless both programs wrote the same rows."""
    for split in ("train", "valid", "test"):
        found = pa.concat_tables([pq.read_table(path) for path in sorted((ours / split).iterdir())])
        expected = pq.read_table(theirs / f"{split}.parquet")
        if not found.cast(expected.schema).equals(expected):  # our columns are declared as not nullable
            sys.exit(f"{ours.name} and {theirs.name} wrote different rows for the split {split}")


def repeated(raw: Path, out: Path, times: int) -> Path:
    """Write the text of ``raw`` ``times`` times to ``out``, with the same compression."""
    with out.open("wb") as sink:
        for _ in range(times):
            with raw.open("rb") as source:
                shutil.copyfileobj(source, sink)
    return out


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, help="a raw Criteo log, plain or .gz (default: a synthetic one)")
    parser.add_argument("--times", type=int, default=4, help="how often its text is repeated (default %(default)s)")
    parser.add_argument("--rows", type=int, default=150_000, help="rows of the synthetic log (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each program (default %(default)s)")
    parser.add_argument("--processes", type=int, help="processes of mlet prepare (default: one for each core)")
    parser.add_argument("--memory", action="store_true", help="also measure the memory for 1 and 8 times the text")
    parser.add_argument("--json", action="store_true", help="print a JSON object as the last line")
    parser.add_argument("--polars", nargs=2, type=Path, metavar=("RAW", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.polars:
        by_polars(*args.polars, min_count=2)
        return
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        work_dir = Path(folder)
        source = args.raw
        if source is None:
            command = ["synth", "--out", str(work_dir / "raw"), "--rows", str(args.rows), "--format", "tsv"]
            subprocess.run([sys.executable, "-m", "mlet_dist", *command], cwd=ROOT, check=True, capture_output=True)
            [source] = (work_dir / "raw").iterdir()
        raw = repeated(source, work_dir / f"raw{source.suffix}", args.times)
        seconds: dict[str, list[float]] = {"ours": [], "line_by_line": []}
        if find_spec("polars"):
            seconds["polars"] = []
        passes: dict[str, float] = {}
        rows = 0
        for _ in range(args.repeats):
            for name in seconds:
                shutil.rmtree(work_dir / name, ignore_errors=True)
            elapsed, rows, passes, _ = prepare(raw, work_dir / "ours", args.processes)
            seconds["ours"].append(elapsed)
            started = time.perf_counter()
            line_by_line(raw, work_dir / "line_by_line", min_count=2)
            seconds["line_by_line"].append(time.perf_counter() - started)
            if "polars" in seconds:
                seconds["polars"].append(seconds_of_polars(raw, work_dir / "polars"))
            for name in [*seconds][1:]:
                assert_same(work_dir / "ours", work_dir / name)
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
                shutil.rmtree(work_dir / "ours", ignore_errors=True)
                text = repeated(source, work_dir / f"memory{source.suffix}", times * args.times)
                result[f"peak_mb_{times}x"] = prepare(text, work_dir / "ours", args.processes or 2)[3] >> 20
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
