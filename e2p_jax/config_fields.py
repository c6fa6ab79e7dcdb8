"""What config fields say of themselves and how their values are checked; and a time for a config file to run in.

Each field says in its metadata what it does to a run's result: the parameters after every step, and which checkpoint is
the best. When a run is resumed, fields that change it are compared; the others may change from start to start.
"""

import contextlib
import dataclasses
import signal
import threading
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

T = TypeVar("T")


class Range(NamedTuple):
    """Numbers that a field may have."""

    said: str
    holds: Callable[[float], bool]


POSITIVE = Range("must be positive", lambda number: number > 0)
NOT_NEGATIVE = Range("must not be negative", lambda number: number >= 0)
SHARE = Range("must be in [0, 1)", lambda number: 0 <= number < 1)


def result(default: T, span: Range | None = None) -> T:
    """A field that changes the result: with another value it is another run."""
    return _field(default, "result", span)


def rounding(default: T, span: Range | None = None) -> T:
    """A field that says how the result is computed: with another value it is the same up to rounding."""
    return _field(default, "rounding", span)


def free(default: T, span: Range | None = None) -> T:
    """A field that has no say in the result: with another value it is the same, bit for bit."""
    return _field(default, "free", span)


def _field(default: T, effect: str, span: Range | None) -> T:
    field: T = dataclasses.field(default=default, metadata={"effect": effect, "span": span})
    return field


def fields_that(effect: str, section: Any) -> list[str]:
    """Names of a section's fields (`TrainConfig`, or one of its values) with this effect, in their order."""
    return [field.name for field in dataclasses.fields(section) if field.metadata["effect"] == effect]


LARGEST_FLOAT = 3.4028234663852886e38  # float32's


def fault_of(given: Any, kind: Any) -> str | None:
    """Says what `given` should have been, unless it is of that kind: a field's annotation."""
    if typing.get_origin(kind) is Annotated:  # by `registry.one_of`
        kind = kind.__metadata__[0].constructor_factory()
    options = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return None if given in options else f"choose from {', '.join(options)}"
    if typing.get_origin(kind) is tuple:
        if not isinstance(given, tuple):
            return "it must be a tuple"
        return next(filter(None, (fault_of(each, options[0]) for each in given)), None)
    if options:  # X | None
        return None if given is None else fault_of(given, options[0])
    if kind is float:
        is_number = isinstance(given, int | float) and not isinstance(given, bool)
        return None if is_number and abs(given) <= LARGEST_FLOAT else "it must be a finite number"
    if kind is int:
        is_number = isinstance(given, int) and not isinstance(given, bool)
        return None if is_number and abs(given) < 2**32 else "it must be a whole number of 32 bits"
    return None if isinstance(given, kind) else f"it must be a {kind.__name__}"


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError in the block after that long; signals reach the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"still running after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
