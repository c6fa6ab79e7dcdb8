"""Other values for config fields."""

import typing
from typing import Any


def another(value: Any, kind: Any) -> Any:
    """A value of the field's type that is not this one."""
    if typing.get_origin(kind) is typing.Annotated:
        kind = kind.__metadata__[0].constructor_factory()
    if typing.get_origin(kind) is typing.Literal:
        return next(choice for choice in typing.get_args(kind) if choice != value)
    if isinstance(value, tuple):
        element = typing.get_args(kind)[0]
        return (*value, "more") if element is str else () if value else typing.get_args(element)[:1]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else f"{value} other"
