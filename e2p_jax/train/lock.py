"""One command at a time trains in a run directory."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from e2p_jax.errors import UserError
from e2p_jax.files import in_bucket
from e2p_jax.parallel import distributed


@contextlib.contextmanager
def lock_run(run: epath.Path) -> Iterator[None]:
    """Keeps other commands from training in `run`.

    Raises:
      UserError: another command is training there, or the bucket cannot be written.
    """
    if not distributed.is_first():
        yield
        return
    me = f"process {os.getpid()} on host {socket.gethostname()}"
    with contextlib.ExitStack() as stack:
        try:
            if in_bucket(run):
                from e2p_jax.train.lease import lease

                stack.enter_context(lease(run, me))
            else:
                stack.enter_context(_locked_file(run, me))
        except BlockingIOError as error:
            holder = str(error) or "another command"
            raise UserError(f"{run}: {holder} is training there; stop it, or choose another --workdir") from error
        yield


@contextlib.contextmanager
def _locked_file(run: epath.Path, me: str) -> Iterator[None]:
    """The system takes the lock back when this process ends.

    Raises:
      BlockingIOError: with the name of who holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    with Path(run / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise BlockingIOError(file.read().strip()) from error
        file.truncate(0)
        file.write(f"{me}\n")
        file.flush()
        yield
