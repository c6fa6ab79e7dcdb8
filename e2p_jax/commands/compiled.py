"""Compiled programs, kept between commands.

JAX writes them in place. A kill or a full disk leaves a part of one; JAX then compiles anew and warns, and does so at
every start, since it never writes over a file that is there.
"""

import contextlib
import glob
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from e2p_jax.terminal import say

_DAMAGED = re.compile(r"Error reading persistent compilation cache entry for '([^']+)'")


@contextlib.contextmanager
def damaged_programs_removed() -> Iterator[None]:
    """Within the block, a damaged program's file makes way for the one that is compiled in its place."""
    show = warnings.showwarning
    said: set[str] = set()  # a place that cannot be written is one for every program

    def show_or_remove(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not (found := _DAMAGED.match(str(message))):
            show(message, category, filename, lineno, file, line)
            return
        cache = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", ""))
        programs, refused = list(cache.glob(f"{glob.escape(found[1])}-*-cache")), not os.access(cache, os.W_OK)
        with contextlib.suppress(OSError):
            for path in programs:
                path.unlink(missing_ok=True)
        if refused or any(path.exists() for path in programs):
            told = f"{cache}: cannot be written; set JAX_COMPILATION_CACHE_DIR to a place that keeps what is compiled"
        else:
            told = f"{cache}: the compiled program {found[1]} was damaged; it is compiled and kept anew"
        if told not in said:
            say(told)
        said.add(told)

    warnings.showwarning = show_or_remove
    try:
        yield
    finally:
        warnings.showwarning = show
