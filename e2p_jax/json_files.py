"""JSON that others wrote: every way in which it can be damaged ends in an error that names the file.

Imports nothing heavy.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e2p_jax.errors import UserError

if TYPE_CHECKING:
    from etils import epath

_SEAL = "sha256"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_object(path: "Path | epath.Path", remedy: str) -> dict[str, Any]:
    """The object in a file.

    Args:
      remedy: what to do about a damaged file, the end of the error.

    Raises:
      UserError: missing, or what `parse_object` refuses.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from error
    return parse_object(data, path, remedy)


def parse_object(data: bytes | str, source: "Path | epath.Path", remedy: str) -> dict[str, Any]:
    """The same, of what was read from `source`.

    Raises:
      UserError: what `object_in` refuses.
    """
    try:
        return object_in(data)
    except json.JSONDecodeError as error:
        raise UserError(f"{source}: line {error.lineno}: malformed JSON ({error.msg}); {remedy}") from error
    except ValueError as error:
        raise UserError(f"{source}: {error}; {remedy}") from error


def object_in(data: bytes | str) -> dict[str, Any]:
    """
    Raises:
      ValueError: what `loads` refuses, or something else than an object.
    """
    values = loads(data)
    if not isinstance(values, dict):
        raise ValueError(f"the file must be a JSON object, and is {type(values).__name__}")
    return values


def loads(data: bytes | str) -> Any:
    """
    Raises:
      ValueError: not UTF-8, not JSON, nested too deep, NaN or infinity, a key twice in an object, or a text that cannot
        be encoded again. A JSONDecodeError says where.
    """
    text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    try:
        values = json.loads(text, object_pairs_hook=_once, parse_constant=_refuse_constant)
        if _SURROGATE.search(text):
            json.dumps(values, ensure_ascii=False).encode()
    except json.JSONDecodeError:
        raise
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half a surrogate pair ({error.object[error.start]!r}); drop it") from error
    except RecursionError as error:
        raise ValueError("malformed JSON (nested too deep)") from error
    except ValueError as error:
        raise ValueError(f"malformed JSON ({error})") from error
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key[:40]!r} stands twice in one object")
    return values


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def digest(values: Any) -> str:
    """SHA-256 of what JSON can say, whatever the order of keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def is_digest(text: Any) -> bool:
    """Tells whether it is a SHA-256 in hexadecimal."""
    return isinstance(text, str) and len(text) == 64 and not set(text) - set("0123456789abcdef")


def is_number(value: Any) -> bool:
    """Tells whether it is an integer or a float, finite even as a float, and no truth value."""
    return type(value) in (int, float) and abs(value) < 1e300


def sealed(values: dict[str, Any]) -> str:
    """A file's text, whose last key is the digest of the others."""
    return json.dumps(values | {_SEAL: digest(values)}, indent=2) + "\n"


def unseal(values: dict[str, Any], damaged: Callable[[str], UserError]) -> dict[str, Any]:
    """Gives what was given to `sealed`; without a seal, as earlier versions wrote it, the values as they are.

    Args:
      damaged: reason -> the error to raise.

    Raises:
      UserError: the values are not those that were sealed.
    """
    values = dict(values)
    seal = values.pop(_SEAL, None)
    if seal is not None and seal != digest(values):
        raise damaged("its sha256 does not agree with the rest")
    return values
