"""User id -> row, for millions of users.

The ids are UTF-8 text, one after the other with a byte between them; the index over them is one array of uint64: a
header, then `starts` [2^bits + 1], `entries` [users], `ends` [rows]. An id's hash (XXH3, 64 bits) names a bucket by its
highest `bits`; `entries[starts[b]:starts[b + 1]]` are those of bucket b, each the lower half of an id's hash and the
id's row; `ends[row]` is where the id ends in the text. Whether a row is the one asked for is decided by the text. Text
and array may be memory-mapped.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from e2p_jax.errors import UserError, shown
from e2p_jax.files import replace_file

_VERSION = 2
_HEADER = 5  # version, checksum of the text and of all that follows here, rows, users, bits
_BODY = 2  # where what the checksum covers begins
_BOM = b"\xef\xbb\xbf"
_LOWER = 0xFFFFFFFF
_BLOCK = 1 << 16  # ids made into Python objects at once


class UserIndex:
    """Rows by user id, and user ids by row. An id that stands twice has the first of its rows."""

    def __init__(self, text: np.ndarray, words: np.ndarray, source: str):
        """
        Args:
          text: [bytes] uint8.
          words: as `build` makes them of this text.
          source: for errors, where they come from.
        """
        self.text, self.source = text, source
        rows, users, bits = map(int, words[2:_HEADER])
        self._bits = bits
        self._starts, self._entries, self._ends = np.split(words[_HEADER:], np.cumsum([(1 << bits) + 1, users]))
        self.rows, self.words = rows, words

    @classmethod
    def of(cls, ids: Sequence[str], source: str) -> "UserIndex":
        """In memory, over ids that may hold anything that is text.

        Raises:
          UserError: naming the row of an id that is not, or begins with what editors put in front of a file.
        """
        encoded = list(map(_encode, ids))
        for row, user in enumerate(encoded):
            if user.startswith(_BOM) or not _is_text(user):
                fault = "begins with a byte order mark" if user.startswith(_BOM) else "holds half a surrogate pair"
                raise UserError(f"{source}: row {row}: user id {shown(ids[row])} {fault}; rename that user")
        text = np.frombuffer(b"\n".join(encoded), np.uint8)
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return cls(text, build(text, np.cumsum(lengths + 1) - 1), source)

    @classmethod
    def open(cls, ids: Path, index: Path | None = None) -> "UserIndex":
        """Over a file of one id a line.

        Args:
          index: Where the index over it is kept: used if it was made for this file, else made anew, and written there
            if that can be done.

        Raises:
          UserError: the file is not UTF-8 text with line feeds.
        """
        text = np.memmap(ids, np.uint8, "r") if ids.stat().st_size else np.zeros(0, np.uint8)
        if index is not None and index.is_file():
            words = _read(index, ids)
            if words is not None:
                return cls(text, words, str(ids))
        made = cls(text, build(text, _line_ends(text, ids)), str(ids))
        if index is not None:
            with contextlib.suppress(OSError):  # somebody else's directory: it is made at every opening
                made.save(index)
        return made

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        with replace_file(path) as temporary, temporary.open("wb") as file:
            np.save(file, self.words, allow_pickle=False)

    def __len__(self) -> int:
        return len(self._entries)

    def ids(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The ids of rows that lie near one another."""
        texts = _texts(self.text, self._ends, np.asarray(rows, np.int64))
        return [text.decode("utf-8", "surrogatepass") for text in texts]

    def lines(self, rows: np.ndarray) -> bytes:
        """The ids of ascending rows, a line feed between two."""
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
            first, last = _spans(self._ends, rows[[0, -1]])
            return self.text[first[0] : last[1]].tobytes()
        return b"\n".join(_texts(self.text, self._ends, rows))

    def repeats(self) -> np.ndarray:
        """Ascending rows whose id stands in an earlier row, too."""
        if len(self) == self.rows:
            return np.zeros(0, np.int64)
        return np.setdiff1d(np.arange(self.rows), (self._entries & np.uint64(_LOWER)).astype(np.int64))

    def find(self, users: Sequence[str]) -> np.ndarray:
        """[N] int64: the row of each user, -1 for one who is not here."""
        # One by one: for a few users, as servers ask, that is ten times as quick as with arrays.
        starts, entries, ends, text = self._starts.data, self._entries.data, self._ends.data, self.text.data
        rows = np.full(len(users), -1, np.int64)
        for number, user in enumerate(map(_encode, users)):
            hashed = xxhash.xxh3_64_intdigest(user)
            bucket = hashed >> (64 - self._bits)
            for entry in entries[starts[bucket] : starts[bucket + 1]]:
                row = entry & _LOWER
                if entry >> 32 == hashed & _LOWER and text[ends[row - 1] + 1 if row else 0 : ends[row]] == user:
                    rows[number] = row
                    break
        return rows


def build(text: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The index's words.

    Args:
      text: [bytes] uint8.
      ends: [rows] int64, where each id ends; one byte lies between an id and the next.
    """
    ends = ends.astype(np.uint64)
    hashes = np.empty(len(ends), np.uint64)
    for first in range(0, len(ends), _BLOCK):
        rows = np.arange(first, min(first + _BLOCK, len(ends)))
        hashes[rows] = _hash(_texts(text, ends, rows), len(rows))
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    kept = np.ones(len(order), bool)
    seen: set[bytes] = set()
    twins = np.flatnonzero(hashes[1:] == hashes[:-1])
    for place in np.union1d(twins, twins + 1):  # in order of rows where hashes are equal
        row = int(order[place])
        user = next(_texts(text, ends, np.array([row])))
        kept[place] = user not in seen
        seen.add(user)
    order, hashes = order[kept], hashes[kept]
    bits = max(len(order).bit_length() - 2, 1)  # two to four users a bucket
    starts = np.zeros((1 << bits) + 1, np.uint64)
    starts[1:] = np.cumsum(np.bincount(_bucket(hashes, bits), minlength=1 << bits))
    entries = hashes << np.uint64(32) | order.astype(np.uint64)
    header = np.array([_VERSION, 0, len(ends), len(order), bits], np.uint64)
    words = np.concatenate([header, starts, entries, ends])
    words[1] = _checksum([text.data, words[_BODY:].data])
    return words


def distinct(values: np.ndarray) -> np.ndarray:
    """[n], ascending, each once; `np.unique` would put millions of numbers into a hash table, at 56 bytes of each."""
    ordered = np.sort(values)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]]


def _read(index: Path, ids: Path) -> np.ndarray | None:
    """The words of an index file; none if it is damaged, or of other ids, or by another version of this code."""
    try:
        words = np.lib.format.open_memmap(index, mode="r")
    except Exception:  # NumPy reads a damaged header as Python: whatever that raises
        return None
    if words.ndim != 1 or words.dtype != np.uint64 or len(words) < _HEADER or words[0] != _VERSION:
        return None
    checksum, rows, users, bits = map(int, words[1:_HEADER])
    if bits > 40 or len(words) != _HEADER + (1 << bits) + 1 + users + rows:
        return None
    body = index.stat().st_size - 8 * (len(words) - _BODY)
    same = checksum == _checksum(itertools.chain(_blocks(ids, 0), _blocks(index, body)))
    return words if same else None


def _checksum(parts: Iterable[Any]) -> int:
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.intdigest()


def _blocks(path: Path, first: int) -> Iterator[bytes]:
    """Reads a file from byte `first` on; it is not mapped, so that it does not stay in memory."""
    with path.open("rb") as file:
        file.seek(first)
        while block := file.read(1 << 22):
            yield block


def _line_ends(text: np.ndarray, path: Path) -> np.ndarray:
    if text[: len(_BOM)].tobytes() == _BOM:
        raise UserError(f"{path}:1: begins with a byte order mark; save the ids as UTF-8 without one")
    ends = np.flatnonzero(text == ord("\n"))
    if len(text) and text[-1] != ord("\n"):
        ends = np.append(ends, len(text))
    for first in range(0, len(ends), _BLOCK):
        rows = np.arange(first, min(first + _BLOCK, len(ends)))
        for number, line in enumerate(_texts(text, ends, rows), first + 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not UTF-8 text; save the ids as UTF-8") from error
            if line.endswith(b"\r"):
                raise UserError(f"{path}:{number}: ends with a carriage return; save the ids with line feeds alone")
    return ends


def _texts(text: np.ndarray, ends: np.ndarray, rows: np.ndarray) -> Iterator[bytes]:
    """The ids of rows that lie near one another, as they stand in the text."""
    if not len(rows):
        return
    first, last = _spans(ends, rows)
    start = int(first.min())
    block = text[start : int(last.max())].tobytes()
    for a, b in zip((first - start).tolist(), (last - start).tolist(), strict=True):
        yield block[a:b]


def _spans(ends: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last (exclusive) byte of the rows' ids."""
    first = np.where(rows > 0, ends[rows - 1].astype(np.int64) + 1, 0)
    return first, ends[rows].astype(np.int64)


def _bucket(hashes: np.ndarray, bits: int) -> np.ndarray:
    return (hashes >> np.uint64(64 - bits)).astype(np.int64)


def _is_text(user: bytes) -> bool:
    try:
        user.decode()
    except UnicodeDecodeError:
        return False
    return True


def _encode(user: str) -> bytes:
    return user.encode("utf-8", "surrogatepass")


def _hash(ids: Iterable[bytes], count: int) -> np.ndarray:
    return np.fromiter(map(xxhash.xxh3_64_intdigest, ids), np.uint64, count)
