"""Where numbers go: metrics.jsonl, TensorBoard, and the console."""

import json
import os
import time
from pathlib import Path
from typing import TextIO

import rich.console
import rich.progress
from tensorboardX import SummaryWriter

from e2p_jax.files import write_text


class MetricsLog:
    """Appends to `metrics.jsonl` and TensorBoard; on resume, drops what lies beyond the resumed step."""

    def __init__(self, run: Path, resumed_step: int):
        self.path = run / "metrics.jsonl"
        if self.path.exists():
            # A killed run may have logged past its checkpoint, or torn the last line.
            kept = [line for line in read_metrics(self.path) if line["step"] <= resumed_step]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file: TextIO = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Makes everything so far durable; called before a checkpoint that stands for it."""
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; a torn last line is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


class Progress:
    """A rich bar with loss, tokens a second and ETA on a terminal; plain lines elsewhere. On stderr."""

    def __init__(self, steps: int, done: int, label: str):
        self.console = rich.console.Console(stderr=True)
        self.steps, self.label = steps, label
        self._start, self._done = time.monotonic(), done
        self._bar: rich.progress.Progress | None = None
        if self.console.is_terminal:
            columns = ("{task.description}", rich.progress.BarColumn(), "{task.completed}/{task.total}")
            self._bar = rich.progress.Progress(
                *columns, rich.progress.TimeRemainingColumn(), "{task.fields[note]}", console=self.console
            )
            self._task = self._bar.add_task(label, total=steps, completed=done, note="")
            self._bar.start()

    def say(self, text: str) -> None:
        (self._bar.console if self._bar else self.console).print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, step: int, note: str, show: bool) -> None:
        """`show` prints a plain line where there is no terminal."""
        if self._bar:
            self._bar.update(self._task, completed=step, note=note)
        elif show:
            elapsed = time.monotonic() - self._start
            left = elapsed / max(step - self._done, 1) * (self.steps - step)
            self.say(f"{self.label} {step}/{self.steps}  {note}  ETA {int(left // 60)}:{int(left % 60):02d}")

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
