"""What config fields say of themselves and how their values are checked; and a time for a config file to run in.

Each field says in its metadata what it does to a run's result: the parameters after every step, and which checkpoint is
the best. When a run is resumed, fields that change it are compared; the others may change from start to start.
"""

import contextlib
import dataclasses
import datetime
import signal
import threading
import typing
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

from e2p_jax.registry import PROJECTORS

if TYPE_CHECKING:
    from e2p_jax.config import Config

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


def checks(config: "Config") -> list[tuple[bool, str]]:
    """What must hold of fields together, and what is said where it does not."""
    kind = config.adapter.kind
    found = [
        (config.data.seq_len > 0 and config.data.seq_len % 128 == 0, "data.seq_len must be a multiple of 128"),
        (
            config.train.accumulation > 0 and config.train.rows % config.train.accumulation == 0,
            "train.accumulation must divide train.rows",
        ),
        (0 <= config.train.warmup_steps < config.train.steps, "train.warmup_steps must be from 0 to below train.steps"),
        (0 <= config.train.final_learning_rate <= 1, "train.final_learning_rate must be in [0, 1]"),
        (
            config.data.missing_user != "null" or config.train.null_user_rate > 0,
            "data.missing_user=null needs a null user: set train.null_user_rate, to 0.1 say",
        ),
        (
            not 0 < config.projector.max_scale < config.projector.init_scale,
            "projector.max_scale is below projector.init_scale: the first soft tokens would be beyond the bound",
        ),
        (
            config.projector.shared_tokens < config.projector.num_tokens,
            "projector.shared_tokens must be below projector.num_tokens: no soft token would be the user's",
        ),
        (
            config.projector.start != "words" or hasattr(PROJECTORS[config.projector.kind].load(), "begin"),
            f"projector.kind {config.projector.kind} cannot begin as a linear map (it has no `begin`): set "
            "projector.start=random, or choose another kind",
        ),
        (bool(config.train.trainable), "train.trainable is empty: nothing would be trained"),
        (
            not config.data.items or config.data.targets == "assistant",
            "data.items needs data.targets=assistant: an item is predicted where the last reply begins",
        ),
        (
            config.backbone.quantization == "none" or config.backbone.weights == "pretrained",
            "backbone.quantization is of pretrained weights; random ones are there to be trained",
        ),
        ("{context}" in config.data.context_prompt, "data.context_prompt must contain {context}"),
        (_is_date(config.data.template_date), "data.template_date must be a date like 2024-07-26"),
        (bool(config.data.eval_splits), "data.eval_splits is empty: name at least one split"),
        (
            config.data.dev_split not in ("dev", *config.data.eval_splits, config.data.train_split),
            "data.dev_split must be auto, or a split that is neither trained on nor reported, and not called dev",
        ),
        (
            kind == "none" or any(p.startswith((f"{kind}/", "**")) for p in config.train.trainable),
            f"adapter.kind is {kind}, but train.trainable names no {kind}/**: adapters would stay as they begin",
        ),
        (config.evaluate.candidates > 1, "evaluate.candidates must be 2 or more"),
    ]
    for axis, size in dataclasses.asdict(config.mesh).items():
        found.append((size == -1 or size > 0, f"mesh.{axis} must be positive, or -1 for what is left"))
    return found


def _is_date(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True


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
