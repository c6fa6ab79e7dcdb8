"""The lock of a run in a bucket, where `locks.py` is of no use: no system takes it back from a process that was killed.

The object `.lock` names its holder; an empty one is nobody's. Its generation, a number that the server gives, changes
with every writing, and the server writes only in place of the generation that the writer names. The holder writes it
anew every `RENEW_SECONDS`. Who finds a holder waits: where the generation changes, somebody is training; where it has
not changed for `STALE_SECONDS`, the holder is dead, and of all who saw that the first writes. No clocks are compared.
"""

import contextlib
import threading
import time
import uuid
from collections.abc import Iterator

from etils import epath
from google.api_core.exceptions import GoogleAPIError, NotFound, PreconditionFailed
from google.auth.exceptions import GoogleAuthError
from google.cloud import storage

from e2p_jax.errors import UserError
from e2p_jax.parallel import distributed

RENEW_SECONDS = 10.0
STALE_SECONDS = 40.0
_FAILURES = (GoogleAPIError, GoogleAuthError, OSError)  # of the service, the account, the network


@contextlib.contextmanager
def lease(run: epath.Path, me: str) -> Iterator[None]:
    """Holds the lock and renews it; where another has taken it all the same, ends all processes of the run.

    Raises:
      BlockingIOError: with the name of who holds it.
      UserError: the bucket cannot be written.
    """
    me = f"{me} (lock {uuid.uuid4().hex[:8]})"
    try:
        lock = _Lock(run)
        holder = lock.take(me)
    except _FAILURES as error:
        said = str(error).partition("\n")[0]
        raise UserError(
            f"{run}: cannot be written ({said}); check the bucket's name, and that this machine's account may create "
            "and delete objects there"
        ) from error
    if holder:
        raise BlockingIOError(holder)
    released = threading.Event()

    def renew() -> None:
        while not released.wait(RENEW_SECONDS):
            try:
                with contextlib.suppress(*_FAILURES):  # the next round may reach it again
                    if not lock.write(me):
                        distributed.end_all(f"{run}: {lock.read()} took its lock, which was not renewed in time")
            except Exception as error:  # of whatever kind: a thread that dies tells nobody, and its lock goes stale
                said = f"{type(error).__name__}: {error}"
                distributed.end_all(f"{run}: its lock cannot be renewed ({said}); rerun the same command to resume")

    renewing = threading.Thread(target=renew, name="lock", daemon=True)
    renewing.start()
    try:
        yield
    finally:
        released.set()
        renewing.join()
        with contextlib.suppress(*_FAILURES):  # what is not given back goes stale
            lock.write("")


class _Lock:
    """The object, as this process last read or wrote it."""

    def __init__(self, run: epath.Path):
        bucket, _, self._name = str(run / ".lock").removeprefix("gs://").partition("/")
        self._bucket = storage.Client().bucket(bucket)
        self._generation = 0  # no object is there

    def take(self, me: str) -> str:
        """Says who holds it where that is another; empty where it is taken."""
        holder = self.read()
        found, deadline = self._generation, time.monotonic() + STALE_SECONDS
        while holder and time.monotonic() < deadline:
            time.sleep(RENEW_SECONDS / 4)
            holder = self.read()
            if holder and self._generation != found:
                return holder
        return "" if self.write(me) else self.read()

    def read(self) -> str:
        blob = self._bucket.blob(self._name)  # that of before asks for the generation of before
        try:
            text = blob.download_as_text()
        except NotFound:
            self._generation = 0
            return ""
        self._generation = blob.generation
        return text

    def write(self, text: str) -> bool:
        """False where another has written since this process read or wrote it."""
        blob = self._bucket.blob(self._name)
        try:
            blob.upload_from_string(text, if_generation_match=self._generation)
        except PreconditionFailed:
            return self.read() == text  # the client asks again where an answer was lost
        self._generation = blob.generation
        return True
