"""The one lock between processes of a machine, or of hosts that share storage: a file that one of them has at a time.

The system takes it back when its holder ends, however that ends. Nothing does so in a bucket: see `train/lease.py`.
"""

import contextlib
import fcntl
import itertools
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path, holder: str | None = None) -> Iterator[None]:
    """Makes a file, and its folder, and holds it. The block may rename or remove it; else it stays for the next.

    Args:
      holder: written into the file, and told to whoever comes meanwhile: nobody waits. Without one, all wait in turn.

    Raises:
      BlockingIOError: with the name of who holds it.
    """
    for attempt in itertools.count():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a+b")
        except FileNotFoundError:  # the process before has just removed the folder
            if attempt == 1000:  # or the system says so of a folder that takes no files, as /proc
                raise
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if holder else 0))
            except BlockingIOError as error:
                file.seek(0)
                raise BlockingIOError(file.read().decode().strip()) from error
            except OSError:  # storage without locks
                if holder:
                    raise
            try:
                mine = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:
                mine = False
            if mine:  # else the process before has renamed or removed it
                if holder:
                    file.truncate(0)
                    file.write(f"{holder}\n".encode())
                    file.flush()
                yield
                return
