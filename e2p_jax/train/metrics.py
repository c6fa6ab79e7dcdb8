"""Writes numbers to metrics.jsonl, TensorBoard, and the console."""

import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import rich.progress
from etils import epath
from tensorboardX import SummaryWriter

from e2p_jax.errors import UserError
from e2p_jax.files import LineFile, in_bucket, write_bytes, write_text
from e2p_jax.parallel.distributed import is_first
from e2p_jax.terminal import Console
from e2p_jax.train.beyond import NAMED, Beyond, mean_warning


class MetricsLog:
    """Appends to `metrics.jsonl` and TensorBoard; on resume, drops what lies beyond the resumed step.

    In a bucket both are as of the last `sync`; until then TensorBoard's file is one of this machine.
    """

    def __init__(self, run: epath.Path, resumed_step: int):
        self.path = run / "metrics.jsonl"
        if self.path.exists():
            # A killed run may have logged past its checkpoint, or torn the last line.
            kept = [line for line in read_metrics(self.path) if line["step"] <= resumed_step]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = LineFile(self.path)
        self._events = run / "tensorboard"
        self._here = tempfile.TemporaryDirectory() if in_bucket(run) else None
        board = self._here.name if self._here else str(self._events)
        self._board = SummaryWriter(board, purge_step=resumed_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Numbers by name; a dict of numbers goes into metrics.jsonl alone."""
        self._file.write(json.dumps({"step": step, **values}))
        for name, value in values.items():
            if not isinstance(value, dict):
                self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Makes everything so far durable; called before a checkpoint that stands for it."""
        self._file.sync()
        self._board.flush()
        self._copy_events()

    def _copy_events(self) -> None:
        for path in Path(self._here.name).iterdir() if self._here else ():
            write_bytes(self._events / path.name, path.read_bytes())

    def close(self) -> None:
        self._file.close()
        self._board.close()
        self._copy_events()
        if self._here:
            self._here.cleanup()


def read_metrics(path: epath.Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; a torn last line is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


class Progress:
    """A rich bar with loss, tokens per second and ETA on a terminal; plain lines elsewhere. On stderr."""

    def __init__(self, steps: int, done: int, label: str):
        self.console = Console(stderr=True, quiet=not is_first())
        self.steps, self.label = steps, label
        self._start, self._done = time.monotonic(), done
        self._bar: rich.progress.Progress | None = None
        if self.console.is_terminal and is_first():
            columns = ("{task.description}", rich.progress.BarColumn(), "{task.completed}/{task.total}")
            self._bar = rich.progress.Progress(
                *columns, rich.progress.TimeRemainingColumn(), "{task.fields[note]}", console=self.console
            )
            self._task = self._bar.add_task(label, total=steps, completed=done, note="")
            self._bar.start()

    def say(self, text: str) -> None:
        (self._bar.console if self._bar else self.console).print(text, highlight=False, soft_wrap=True)

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


class Recorder:
    """Takes a step's metrics as it is dispatched, and waits for those of the step before.

    So the device always has its next step, and never more than that: whoever stops the run waits for two steps at the
    most. And no step goes unseen: one that is not finite ends the run before anything is evaluated or saved after it.
    """

    def __init__(
        self,
        run: epath.Path,
        *,
        steps: int,
        first: int,
        log_every: int,
        tokens_per_step: int,
        users: Callable[[int], str],
    ):
        """
        Args:
          run: Run directory.
          steps: Of the whole run.
          first: Steps already done.
          tokens_per_step: B * T, for the speed shown.
          users: Names those of a step's batch.
        """
        self.progress = Progress(steps, first, "train")
        self._log = MetricsLog(run, first) if is_first() else None
        self._steps, self._first, self._log_every, self._tokens = steps, first, log_every, tokens_per_step
        self._users = users
        self._pending: tuple[int, Any] | None = None  # the step that was dispatched last
        self._clock = (time.monotonic(), first)  # when the last step was written, and which

    def step(self, number: int, metrics: Any) -> None:
        """Returns when the step before `number` is done.

        Args:
          number: Of the step that was dispatched.
          metrics: a NamedTuple of device scalars.

        Raises:
          UserError: the step before is not finite.
        """
        for value in metrics:
            value.copy_to_host_async()
        before, self._pending = self._pending, (number, metrics)
        self._settle(before)

    def flush(self) -> None:
        """Returns when every step is done.

        Raises:
          UserError: the last one is not finite.
        """
        before, self._pending = self._pending, None
        self._settle(before)

    def _settle(self, dispatched: tuple[int, Any] | None) -> None:
        """Waits for a step and, where it is to be logged, writes its metrics."""
        if dispatched is None:
            return
        number, metrics = dispatched
        values = {f"train/{name}": float(value) for name, value in jax.device_get(metrics)._asdict().items()}
        if wrong := [f"{name.removeprefix('train/')} {v}" for name, v in values.items() if not math.isfinite(v)]:
            raise UserError(
                f"step {number} is not finite ({', '.join(wrong)}), and nothing of it was saved; users of its batch, "
                f"largest vectors first: {self._users(number)}; look at their vectors and texts, or lower "
                "train.learning_rate in another --workdir; the same command goes on from the last checkpoint"
            )
        if number % self._log_every and number not in (self._first + 1, self._steps):
            return
        now = time.monotonic()
        speed = (number - self._clock[1]) * self._tokens / (now - self._clock[0])
        self._clock = (now, number)
        if self._log:
            self._log.write(number, {**values, "train/tokens_per_second": speed})
        self.progress.update(number, f"loss {values['train/loss']:.4f}  {speed:,.0f} tok/s", show=True)

    def evaluation(
        self, number: int, nll: dict[str, float], beyond: Beyond | None = None, mean: float | None = None
    ) -> None:
        """NLL per target by split, after step `number`; the time it took does not count as training.

        Args:
          beyond: of the users of `dev`.
          mean: what the mean of all vectors costs them beyond nothing in front, nats a target.
        """
        self.flush()
        values: dict[str, Any] = {f"eval/{name}/nll": value for name, value in nll.items()}
        self.progress.say(f"step {number}: " + ", ".join(f"{name} NLL {value:.4f}" for name, value in nll.items()))
        if beyond:
            worst = beyond.worst(NAMED)
            values |= {"eval/dev/worst_user": worst[0][1], "eval/dev/broken_users": beyond.broken}
            if warning := beyond.warning():
                values["eval/dev/broken"] = dict(worst[: beyond.broken])
                self.progress.say(f"step {number}, dev: {warning}")
        if mean is not None:
            values["eval/dev/mean_vector"] = mean
            if warning := mean_warning(mean):
                self.progress.say(f"step {number}, dev: {warning}")
        if self._log:
            self._log.write(number, values)
        self._clock = (time.monotonic(), number)

    def sync(self) -> None:
        """Everything so far is on disk when this returns: a checkpoint may stand for it."""
        self.flush()
        if self._log:
            self._log.sync()

    def close(self) -> None:
        if self._log:
            self._log.close()
        self.progress.close()
