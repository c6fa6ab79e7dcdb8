"""Runs commands that can be killed: imports everything once, then forks for each, which is cheap.

Started with the names of modules; a line of JSON on stdin is one call, and answered by a line on stdout.
"""

import contextlib
import importlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "shutil.rmtree"}
WRITES = os.O_WRONLY | os.O_RDWR


def call(
    module: str,
    function: str,
    arguments: list[Any],
    log: str,
    environment: dict[str, str],
    change: int | None,
    seconds: float | None,
) -> Any:
    """Calls it in a process of its own, which is killed before the nth change to the disk that Python makes, or after a
    while.

    Returns:
      How it ended, its seconds of wall clock and of processors, and how many changes it made if it was not killed.
    """
    counts, count = os.pipe()
    began, spent = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    child = os.fork()
    with contextlib.suppress(OSError):  # both, for either may come first
        os.setpgid(child, child)
    if child == 0:
        os.environ.update(environment)
        _run(module, function, arguments, log, change, count)
    os.close(count)
    deadline = began + (900 if seconds is None else seconds)
    while (status := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            status = os.waitpid(child, 0)
            break
        time.sleep(0.001)
    elapsed = time.monotonic() - began
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it had started
    with os.fdopen(counts) as file:
        text = file.read()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - spent.ru_utime - spent.ru_stime
    return os.waitstatus_to_exitcode(status[1]), elapsed, cpu, int(text or 0)


def _run(module: str, function: str, arguments: list[Any], log: str, change: int | None, count: int) -> None:
    code, changes = 99, 0
    try:
        with Path(log).open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)

        def watch(event: str, details: tuple[Any, ...]) -> None:
            nonlocal changes
            if event in CHANGES or (event == "open" and details[2] is not None and details[2] & WRITES):
                changes += 1
                if changes == change:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        code = getattr(sys.modules[module], function)(*arguments) or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        made = changes
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os.write(count, str(made).encode())
        os._exit(code)


def main() -> None:
    """Answers until stdin ends."""
    sys.path.insert(0, str(Path(__file__).parent))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        answers.write(json.dumps(call(**json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
