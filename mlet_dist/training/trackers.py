"""Reports a run to trackers while it trains, on rank 0 alone, from threads that training never waits for.

``metrics.jsonl`` is what they are told: a thread for each tracker reads it as it grows, and sends what it has not sent.
So nothing is lost while a server is down, and a job that is started again goes on where the last one stopped. What a
tracker is told of a step does not change: a step that a resumed run repeats is not sent again, one that is repeated
after a rollback is, since it has other values. ``trackers/NAME.json`` of the run directory holds a tracker's id of the
run, and the last step that was sent of each split.
"""

import json
import threading
import time
from collections.abc import Sequence
from typing import Any

from mlet_dist.atomic_file import replaced_file
from mlet_dist.errors import Interrupted, print_warning
from mlet_dist.formatting import load_json, to_json
from mlet_dist.training.mlflow_tracker import MlflowTracker
from mlet_dist.training.tracked_run import Outcome, TrackedRun, Tracker, without_credentials
from mlet_dist.training.wandb_tracker import WandbTracker

_TRACKERS: dict[str, type[Tracker]] = {each.name: each for each in (MlflowTracker, WandbTracker)}
_BYTES = 1 << 20  # of metrics.jsonl that are read at once
_PAUSE, _RETRY = 2.0, 20.0  # seconds after sending, and after a failure
_LAST_SECONDS = {"finished": 60.0, "stopped": 5.0, "failed": 5.0}  # given to the last records and the files
_SHOWN = 300  # characters of an error
_ROLLBACK = "rollback"


def check_trackers(names: Sequence[str]) -> None:
    """Check, before anything is trained, that the trackers of ``run.trackers`` can be used.

    Raises:
        UserError: a package is not installed, or the environment lacks what it needs.
    """
    for name in names:
        if name in _TRACKERS:
            _TRACKERS[name].check()


class Trackers:
    """The threads that report a run, one for each tracker of ``run.trackers`` besides TensorBoard.

    Args:
        names: as in ``run.trackers``.
        run: what they are told of it.
    """

    def __init__(self, names: Sequence[str], run: TrackedRun) -> None:
        self._senders = [_Sender(_TRACKERS[name](), run) for name in names if name in _TRACKERS]

    def start(self) -> None:
        """Begin to send what metrics.jsonl holds."""
        for sender in self._senders:
            sender.start()

    def notice(self) -> None:
        """Send what has been written to metrics.jsonl since the last call."""
        for sender in self._senders:
            sender.wake.set()

    def roll_back(self, step: int, size: int) -> None:
        """Go back to this step, as ``Recorder.roll_back``; called after metrics.jsonl was truncated."""
        for sender in self._senders:
            sender.roll_back(step, size)

    def close(self, error: BaseException | None) -> None:
        """Send what is left, and end the run; waits for a limited time, and warns if that is not enough.

        Args:
            error: what ended the job, if anything did.
        """
        outcome: Outcome = "finished" if error is None else "stopped" if isinstance(error, Interrupted) else "failed"
        for sender in self._senders:
            sender.close(outcome)
        deadline = time.monotonic() + _LAST_SECONDS[outcome]
        for sender in self._senders:
            sender.join(max(0.0, deadline - time.monotonic()))
            if sender.is_alive():
                sender.warn(f"has not taken all records within {_LAST_SECONDS[outcome]:.0f} s after the last step")


class _Sender(threading.Thread):
    """Sends the records of metrics.jsonl to a tracker; ``wake`` is set when there are new ones."""

    def __init__(self, tracker: Tracker, run: TrackedRun) -> None:
        super().__init__(name=f"tracker {tracker.name}", daemon=True)
        self._tracker, self._run = tracker, run
        self._state = run.directory.trackers / f"{tracker.name}.json"
        self._id: str | None = None
        self._sent: dict[str, int] = {}  # by split, the last step that was sent
        self._offset = self._rollbacks = 0
        self._lock = threading.Lock()  # of metrics.jsonl, and of what was sent of it
        self._begun = self._warned = False
        self._outcome: Outcome | None = None
        self._closing = threading.Event()
        self.wake = threading.Event()
        self.wake.set()

    def run(self) -> None:
        while True:
            self.wake.wait()
            self.wake.clear()
            outcome = self._outcome
            try:
                self._send()
                if outcome is not None:
                    return self._tracker.end(self._run, outcome)
                pause = _PAUSE
            except Exception as error:  # whatever a tracker's library raises
                self.warn(f"{type(error).__name__}: {error}")
                if outcome is not None:
                    return None
                self.wake.set()
                pause = _RETRY
            self._closing.wait(pause)

    def roll_back(self, step: int, size: int) -> None:
        with self._lock:
            self._offset = min(self._offset, size)
            self._sent = {split: min(sent, step) for split, sent in self._sent.items() if split != _ROLLBACK}
            self._rollbacks += 1

    def close(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._closing.set()
        self.wake.set()

    def warn(self, problem: str) -> None:
        """Warn of the first problem of this job."""
        if not self._warned:
            self._warned = True
            print_warning(
                f"run.trackers: {self._tracker.name}: {without_credentials(problem)[:_SHOWN]}; training goes on, and "
                "what the tracker lacks is in metrics.jsonl"
            )

    def _send(self) -> None:
        """Send all records that were not sent."""
        if not self._begun:
            self._begin()
        while True:
            with self._lock:
                rollbacks, start = self._rollbacks, self._offset
                text = self._read(start)
                records = [json.loads(line) for line in text.splitlines()]
                new = [each for each in records if each["step"] > self._sent.get(each["split"], -1)]
            if not text:
                return
            metrics = [(each["step"], _numbers(each)) for each in new]
            self._tracker.log([(step, values) for step, values in metrics if values])
            with self._lock:
                if self._rollbacks != rollbacks:
                    continue
                self._offset = start + len(text)
                self._sent |= {each["split"]: each["step"] for each in new}
            self._save()

    def _begin(self) -> None:
        self._state.parent.mkdir(exist_ok=True)
        if self._state.exists():
            saved = load_json(self._state)
            self._id, self._sent = saved["id"], saved["sent"]
        self._id = self._tracker.begin(self._run, self._id)
        self._save()
        self._begun = True

    def _read(self, start: int) -> bytes:
        """Return the next complete lines of metrics.jsonl, as many as are read at once."""
        with self._run.directory.metrics.open("rb") as file:
            file.seek(start)
            text = file.read(_BYTES)
            if b"\n" not in text:
                text += file.readline()
        return text[: text.rfind(b"\n") + 1]

    def _save(self) -> None:
        with replaced_file(self._state) as file:
            file.write(to_json({"id": self._id, "sent": self._sent}).encode())


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a record by ``split/name``; texts, lists and what is undefined are left out."""
    split = record["split"]
    return {
        f"{split}/{name}": float(value)
        for name, value in record.items()
        if name not in ("step", "split") and isinstance(value, int | float)
    }
