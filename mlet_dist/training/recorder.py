"""What a run says of itself while it goes on: metrics.jsonl, TensorBoard."""

from collections.abc import Mapping
from types import TracebackType
from typing import TextIO

from torch.utils.tensorboard import SummaryWriter

from mlet_dist.json_text import to_json
from mlet_dist.training.run_directory import RunDirectory


class Recorder:
    """Writes records of one run, on the first rank; on the others it does nothing.

    Args:
        first_step: after which this job goes on; TensorBoard drops what an earlier one wrote of later steps.
    """

    def __init__(self, run: RunDirectory, enabled: bool, first_step: int = 0) -> None:
        self._run = run
        self._lines: TextIO | None = None
        self._tensorboard: SummaryWriter | None = None
        if enabled:
            self._open(first_step)

    def record(self, split: str, step: int, values: Mapping[str, float | str]) -> None:
        """Write one line, and one TensorBoard point a number, under ``split/name``."""
        if self._lines is None or self._tensorboard is None:
            return
        self._lines.write(to_json({"step": step, "split": split, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            if not isinstance(value, str):
                self._tensorboard.add_scalar(f"{split}/{name}", value, step)

    def go_back(self, step: int) -> None:
        """Drop the records of steps after ``step``, which are taken again, but not those of rollbacks."""
        if self._lines is None:
            return
        self._close()
        self._run.keep_records(step, rollbacks=True)
        self._open(step)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def _open(self, first_step: int) -> None:
        self._lines = self._run.metrics.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(self._run.tensorboard), purge_step=first_step + 1)

    def _close(self) -> None:
        if self._lines is not None and self._tensorboard is not None:
            self._lines.close()
            self._tensorboard.close()
