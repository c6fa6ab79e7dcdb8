"""What a config field does to a run's result; every field says it in its metadata.

The result is the parameters after every step, and which checkpoint is the best. When a run is resumed, fields that
change it are compared; the others may change from start to start.
"""

import dataclasses
from typing import Any, TypeVar

T = TypeVar("T")


def result(default: T) -> T:
    """A field that changes the result: with another value it is another run."""
    return _field(default, "result")


def rounding(default: T) -> T:
    """A field that says how the result is computed: with another value it is the same up to rounding."""
    return _field(default, "rounding")


def free(default: T) -> T:
    """A field that has no say in the result: with another value it is the same, bit for bit."""
    return _field(default, "free")


def _field(default: T, effect: str) -> T:
    field: T = dataclasses.field(default=default, metadata={"effect": effect})
    return field


def fields_that(effect: str, section: Any) -> list[str]:
    """Names of a section's fields (`TrainConfig`, or one of its values) with this effect, in their order."""
    return [field.name for field in dataclasses.fields(section) if field.metadata["effect"] == effect]
