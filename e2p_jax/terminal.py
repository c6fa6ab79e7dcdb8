"""Prints for people: messages on stderr, text and tables on stdout, and data in them that cannot act on a terminal."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import rich.console
import rich.segment
import rich.text

LONGEST = 4000  # characters of a message; an id or an argument in it may be of any length

# Control characters, line separators, marks that reorder text (Unicode UAX #9), halves of surrogate pairs.
_ACTIVE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_STANDARD = 3  # the numbers of stdin, stdout and stderr are those below


def printable(text: str, *, lines: bool = False) -> str:
    """The text with escapes for all that acts on a terminal or reorders what is around it: ESC, U+202E.

    Args:
      lines: line breaks and tabs stay.
    """

    def escape(found: re.Match[str]) -> str:
        character = found[0]
        return character if lines and character in "\n\t" else character.encode("unicode_escape").decode()

    return _ACTIVE.sub(escape, text)


def say(text: str) -> None:
    """A message, in one line, for the person at the terminal; nobody there is no error."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} [... {len(text) - LONGEST:,} characters ...] {text[-LONGEST // 2 :]}"
    with contextlib.suppress(OSError):
        print(printable(text), file=sys.stderr, flush=True)


class Console(rich.console.Console):
    """Rich's, in which text is text: neither markup nor emoji codes are read, and every character is printable."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> rich.text.Text:
        return super().render_str(printable(text, lines=True), **options)  # before its width is taken

    def render(self, *arguments: Any, **options: Any) -> Iterable[rich.segment.Segment]:
        for segment in super().render(*arguments, **options):
            safe = segment.control or printable(segment.text, lines=True) == segment.text
            yield segment if safe else rich.segment.Segment(printable(segment.text, lines=True), segment.style)


def prepare_streams() -> None:
    """Makes the standard streams safe to write to.

    One that is closed becomes /dev/null, or the next file that is opened would take its number, and messages with it.
    Characters that the terminal's encoding lacks are written as escapes.
    """
    for number in range(_STANDARD):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    sys.stdout = sys.stdout or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (stays open)
    sys.stderr = sys.stderr or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (stays open)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_or_drop() -> None:
    """At an error: what cannot be written to stdout any more is dropped, or the interpreter fails on it at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
