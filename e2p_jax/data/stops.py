"""Reads which tokens end a reply, as a model directory says."""

from pathlib import Path
from typing import Any

from e2p_jax.errors import UserError
from e2p_jax.json_files import read_object


def named_stops(directory: Path) -> set[int]:
    """`eos_token_id` of config.json, of its `text_config`, and of generation_config.json: a number or a list of them.

    Raises:
      UserError: a file that is no JSON object, or an id that is no whole number.
    """
    stops: set[int] = set()
    for path in (directory / "config.json", directory / "generation_config.json"):
        if not path.is_file():
            continue
        values = read_object(path, "restore the file")
        nested = values.get("text_config")
        for held in (values, nested if isinstance(nested, dict) else {}):
            stops.update(_ids(held.get("eos_token_id"), path))
    return stops


def _ids(named: Any, path: Path) -> list[int]:
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if any(isinstance(number, bool) or not isinstance(number, int) for number in ids):
        raise UserError(f"{path}: eos_token_id is {named!r}; give a token id or a list of them")
    return [number for number in ids if number >= 0]
