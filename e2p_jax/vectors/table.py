"""Tables of user vectors, keyed by user id.

A table is a directory: `embeddings.npy` [N, E] float16 or float32, `ids.txt` (one id a line, in row order), `meta.json`
(`name`, `version`, `width`, `dtype`), and `index.npy`, which finds an id's row without reading the others; a directory
without it gets it when it is first opened. Files in other forms are read by `formats.py`.
"""

import contextlib
import json
import mmap
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from e2p_jax.errors import UserError, shown
from e2p_jax.files import existing, replace_directory
from e2p_jax.text_files import parse_json
from e2p_jax.vectors.arrays import map_array
from e2p_jax.vectors.formats import read_file
from e2p_jax.vectors.index import UserIndex

_BLOCK = 1 << 12  # rows looked up or gathered at once: they stay in the processor's cache until they are float32
_WINDOW = 1 << 26  # bytes of a mapped file that are gathered from, about, before they are given back
_PAGE = 1 << 21  # bytes that looking at one row maps at most
FILES = ("embeddings.npy", "ids.txt", "meta.json", "index.npy")  # of a directory; the last can be made again
_SAME = 1e-3  # of a vector's length: two copies of it may differ by what float16 rounds away


class UserTable:
    """User id -> vector. Vectors and ids stay where they are: memory maps when read from a directory."""

    def __init__(
        self,
        ids: Sequence[str] | UserIndex,
        vectors: np.ndarray,
        source: str,
        missing: Literal["error", "null"] = "error",
    ):
        """
        Args:
          ids: N texts, or an index over them.
          vectors: [N, E], floating point.
          source: for errors, where they come from.
          missing: what a user who is not here gets: an error, or NaN, the null user's mark.

        Raises:
          UserError: counts differ, the array is not [N, E] numbers, or an id stands twice with different vectors.
        """
        is_floating = np.issubdtype(vectors.dtype, np.floating) and vectors.dtype.isnative
        if vectors.ndim != 2 or not is_floating or not vectors.shape[1]:
            raise UserError(
                f"{source}: vectors have shape {vectors.shape} and dtype {vectors.dtype}; "
                "save them as [users, width] in float16 or float32, in this machine's byte order"
            )
        index = ids if isinstance(ids, UserIndex) else UserIndex.of(ids, source)
        if index.rows != len(vectors):
            raise UserError(f"{source}: {index.rows} ids for {len(vectors)} vectors; they must match row by row")
        self.index, self.vectors, self.source, self.missing = index, vectors, source, missing
        self._mapped = 0  # bytes since pages were given back; threads that miscount do no harm
        self._file = vectors.base if isinstance(vectors.base, mmap.mmap) and not vectors.flags.writeable else None
        if self._file is not None:
            with contextlib.suppress(AttributeError, OSError):  # other systems, and kernels without large pages
                self._file.madvise(mmap.MADV_HUGEPAGE)  # what look-ups bring in from disk costs few page faults after
        for row in index.repeats().tolist():
            (user,) = index.ids([row])
            first = int(index.find([user])[0])
            if not _agree(vectors[first], vectors[row]):
                raise UserError(
                    f"{source}: user {shown(user)} has different vectors in rows {first} and {row}; keep one"
                )

    @property
    def width(self) -> int:
        return int(self.vectors.shape[1])

    @property
    def ids(self) -> "Ids":
        """In row order, each once; a table's directory is read as they are asked for."""
        return Ids(self.index)

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, users: Sequence[str], where: Sequence[str]) -> np.ndarray:
        """[N] int64, for `gather`: each user's row; -1 for the null user.

        Args:
          users: N user ids, read block by block.
          where: for errors, the record that each stands in.

        Raises:
          UserError: naming the first user who is not here.
        """
        rows = np.empty(len(users), np.int64)
        for first in range(0, len(users), _BLOCK):
            rows[first : first + _BLOCK] = self.index.find(users[first : first + _BLOCK])
        if self.missing == "error" and len(absent := np.flatnonzero(rows < 0)):
            user, place = users[int(absent[0])], where[int(absent[0])]
            raise UserError(f"{place}: user {shown(user)} has no vector in {self.source}{self._remedy(user)}")
        return rows

    def _remedy(self, user: str) -> str:
        """Says what to do about a user who is not here; an id that the same user may have is named, never taken."""
        others = _other_forms(user)
        for other, row in zip(others, self.index.find(others).tolist(), strict=True):
            if row >= 0:
                return f", but {shown(other)} has; ids must agree to the letter, so mend one of the two"
        return "; add it or drop the record"

    def check(self, rows: np.ndarray) -> None:
        """Reads the vectors of rows, block by block.

        Raises:
          UserError: naming the user and row whose vector is not finite.
        """
        size = max(_WINDOW // (4 * self.width), 1)
        for first in range(0, len(rows), size):
            self.gather(rows[first : first + size])

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """[N, E] float32: the vectors of rows, NaN for -1. Threads may gather at the same time.

        Raises:
          UserError: naming the user and row whose vector is not finite.
        """
        out = np.empty((len(rows), self.width), np.float32)
        vectors = np.asarray(self.vectors)
        order = np.argsort(rows, kind="stable")  # in the order of the file
        ordered = rows[order]
        known = int(np.searchsorted(ordered, 0))
        out[order[:known]] = np.nan
        if known == len(rows):
            return out
        apart = (int(ordered[-1] - ordered[known]) + 1) * abs(vectors.strides[0]) // (len(rows) - known)
        apart = min(max(apart, 1), _PAGE)  # bytes that a row maps, where they lie evenly
        size = min(max(_WINDOW // apart, 1), _BLOCK)
        for first in range(known, len(rows), size):
            places = order[first : first + size]
            with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold is named below
                block = vectors[ordered[first : first + size]].astype(np.float32)
            if not (finite := np.isfinite(block)).all():
                bad = rows[places[~finite.all(axis=1)]]
                (user,) = self.index.ids(bad[:1])
                raise UserError(
                    f"{self.source}: row {bad[0]} (user {shown(user)}) holds NaN or infinity; repair or drop it"
                )
            out[places] = block
            self._mapped += apart * len(places)
            if self._file is not None and self._mapped >= _WINDOW:
                self._mapped = 0
                self._file.madvise(mmap.MADV_DONTNEED)  # the pages stay in the system's cache, not with us
        return out

    def lookup(self, users: Sequence[str], where: Sequence[str]) -> np.ndarray:
        """[N, E] float32: `gather` of `rows`.

        Raises:
          UserError: naming the user and row whose vector is missing or not finite.
        """
        return self.gather(self.rows(users, where))


class Ids(Sequence[str]):
    """The user ids of a table in row order, each once, read as they are asked for."""

    def __init__(self, index: UserIndex):
        repeats = index.repeats()
        self._index = index
        self._rows = np.setdiff1d(np.arange(index.rows), repeats) if len(repeats) else range(index.rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return self._index.ids(self._rows[place])
        return self._index.ids([self._rows[place]])[0]

    def rows(self, place: slice) -> np.ndarray:
        """[n] int64, ascending: for `UserTable.gather` and `UserIndex.lines`."""
        return np.asarray(self._rows[place], np.int64)

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _BLOCK):
            yield from self[first : first + _BLOCK]


def open_table(path: str, missing: Literal["error", "null"] = "error", setting: str = "data.embeddings") -> UserTable:
    """Opens a table, or any importable file.

    Args:
      setting: for errors, what named it.
      missing: what a user who is not in it gets: an error, or NaN, the null user's mark.

    Raises:
      UserError: unknown form, missing parts, wrong shapes.
    """
    place = existing(path, setting)
    if place.is_dir():
        return _open_directory(place, missing)
    ids, vectors = read_file(place)
    return UserTable(ids, vectors, str(place), missing)


def save_table(path: Path, ids: Sequence[str], vectors: np.ndarray, *, name: str, version: str, **notes: Any) -> None:
    """Writes a table directory; `notes` are more that its meta.json says.

    Raises:
      UserError: what `UserTable` refuses, or an id that does not fit on a line of `ids.txt`.
    """
    check_ids(ids, str(path))
    table = UserTable(ids, vectors, str(path))
    meta = {"name": name, "version": version, "width": table.width, "dtype": vectors.dtype.name, **notes}
    with replace_directory(path) as temporary:
        _save_array(temporary / "embeddings.npy", vectors)
        with (temporary / "ids.txt").open("wb") as file:
            file.write(table.index.text.tobytes() + b"\n" * (len(vectors) > 0))
        UserIndex.open(temporary / "ids.txt").save(temporary / "index.npy")
        (temporary / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def check_ids(ids: Iterable[str], source: str) -> None:
    """Refuses what does not fit on a line of `ids.txt`.

    Args:
      source: for the error, where the ids come from or go to.

    Raises:
      UserError: an id is empty or holds a line break.
    """
    if broken := [user for user in ids if not user or "\n" in user or "\r" in user]:
        raise UserError(f"{source}: user id {shown(broken[0])} is empty or holds a line break; rename that user")


def _save_array(path: Path, vectors: np.ndarray) -> None:
    """As `np.save` does, but for its way to say that the disk is full, which does not name it."""
    with path.open("wb") as file:
        header = np.lib.format.header_data_from_array_1_0(np.empty((0, 1), vectors.dtype)) | {"shape": vectors.shape}
        np.lib.format.write_array_header_1_0(file, header)
        for first in range(0, len(vectors), _BLOCK):
            file.write(np.ascontiguousarray(vectors[first : first + _BLOCK]).data)


def _agree(a: np.ndarray, b: np.ndarray) -> bool:
    """Tells whether they differ by next to nothing of their own length, however long they are. A NaN differs."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):  # before a cast, in which a signalling NaN warns
        return False
    a, b = a.astype(np.float64), b.astype(np.float64)
    scale = max(np.abs(a).max(), np.abs(b).max())
    if scale == 0:
        return True
    return bool(np.linalg.norm((a - b) / scale) <= _SAME * np.linalg.norm(a / scale))


def _other_forms(user: str) -> list[str]:
    """Gives what another program may have made of an id, or this one of what it was: never the id itself."""
    bare = user.strip().strip("\ufeff\"'")
    forms = [bare, f"{bare} ", f" {bare}", f"{bare}\r", f'"{bare}"', bare.lower(), bare.upper(), bare.title()]
    forms += [unicodedata.normalize(form, bare) for form in ("NFC", "NFD")]
    if re.fullmatch(r"[0-9]+(\.0+)?", bare):
        whole = bare.split(".")[0]
        forms += [whole, f"{whole}.0", whole.lstrip("0") or "0"]
    return [form for form in dict.fromkeys(forms) if form != user]


def _open_directory(place: Path, missing: Literal["error", "null"]) -> UserTable:
    absent = [name for name in FILES[:-1] if not (place / name).is_file()]
    if absent:
        raise UserError(f"{place}: not a table of user vectors; missing {', '.join(absent)}")
    vectors, meta = map_array(place / "embeddings.npy"), _read_meta(place / "meta.json")
    if vectors.ndim != 2 or vectors.shape[1] != meta["width"]:
        raise UserError(f"{place}: embeddings.npy has shape {vectors.shape}, but meta.json says width {meta['width']}")
    if vectors.dtype.name != meta.get("dtype", vectors.dtype.name):
        raise UserError(f"{place}: embeddings.npy holds {vectors.dtype}, but meta.json says {repr(meta['dtype'])[:60]}")
    index = UserIndex.open(place / "ids.txt", place / "index.npy")
    return UserTable(index, vectors, str(place), missing)


def _read_meta(path: Path) -> dict[str, Any]:
    remedy = "must be a JSON object with a width"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; it {remedy}") from error
    meta = parse_json(text, str(path), f"it {remedy}")
    if not isinstance(meta, dict) or type(meta.get("width")) is not int:
        raise UserError(f"{path}: {remedy}")
    return meta
