"""Errors that end a command; the command line prints each as a single line."""

import contextlib
import errno
import os
import resource
from collections.abc import Iterator


class UserError(Exception):
    """A mistake that a user can mend: bad input, configuration or environment.

    The message names the file, row, key or flag at fault and the remedy.
    """


class UsageError(UserError):
    """A command line that means nothing: exit code 2, as for a flag that does not exist."""


class Preempted(Exception):
    """The run was told to stop, and saved itself; the same command resumes it."""


RESTART = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong with the command; the launchers run it again


def shown(text: str, longest: int = 80) -> str:
    """Quotes an id or a path for an error: on one line, and not all of it where that is much."""
    return repr(text if len(text) <= longest else f"{text[:longest]}...")


@contextlib.contextmanager
def explain_open_files() -> Iterator[None]:
    """Turns what is made of a file that could not be opened, because too many were, into an error that says so.

    Raises:
      UserError: this process may open no more files.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause and os.strerror(errno.EMFILE) not in str(cause):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise UserError(
            f"too many open files: {limit} are allowed here; allow more (`ulimit -n {max(4096, 2 * limit)}`) and run "
            "the same command again"
        ) from error
