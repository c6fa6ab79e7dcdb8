"""A trace of some steps of a run, for XProf and TensorBoard."""

import contextlib
import socket
import tempfile
from pathlib import Path
from typing import Any

import jax
from etils import epath

from e2p_jax.files import write_bytes

_WARM_UP = 2  # steps before the first that is traced: they allot memory, and fill what is made ahead


class Profile:
    """Traces `count` steps, from the third on that this process runs.

    Every process writes `profile/plugins/profile/STEPS/HOST.PROCESS.xplane.pb` in the run directory, once the last of
    these steps is done: one profile of all hosts.
    """

    def __init__(self, run: epath.Path, first: int, count: int):
        """
        Args:
          first: steps already done.
          count: steps to trace, 0 for none.
        """
        self._steps = range(first + _WARM_UP + 1, first + _WARM_UP + 1 + count)
        self._folder = run / "profile" / "plugins" / "profile" / f"steps-{self._steps.start}-{self._steps.stop - 1}"
        self._here: tempfile.TemporaryDirectory[str] | None = None

    def step(self, number: int) -> contextlib.AbstractContextManager[Any]:
        """Around the dispatch of step `number`."""
        if self._steps and number == self._steps.start:
            self._here = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._here.name)
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def after(self, number: int, results: Any) -> None:
        """After the dispatch of step `number`, whose results are waited for if it is the last that is traced."""
        if self._here and number == self._steps.stop - 1:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes what was traced, if it is not yet written."""
        if self._here is None:
            return
        jax.profiler.stop_trace()
        name = f"{socket.gethostname()}.{jax.process_index()}"
        for path in Path(self._here.name).rglob("*.xplane.pb"):
            write_bytes(self._folder / f"{name}.xplane.pb", path.read_bytes())
        self._here.cleanup()
        self._here = None
