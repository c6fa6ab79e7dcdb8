"""Published layouts of interactions, and one's own, read as they come."""

import array
import contextlib
import dataclasses
import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from e2p_jax.datasets.bad_records import BadRecords
from e2p_jax.errors import UserError
from e2p_jax.text_files import Line, Table, number, open_table, shortened


@dataclasses.dataclass(frozen=True)
class File:
    """One table of a layout: its name, its form, and which of its columns mean something here."""

    name: str  # or a pattern, such as *.inter
    delimiter: str
    roles: Mapping[str, str | tuple[str, ...]]  # user, item, weight, time or item, title -> column, or any of these
    columns: tuple[str, ...] | None = None  # None: the header names them
    encoding: str = "utf-8"


@dataclasses.dataclass(frozen=True)
class Layout:
    """A release: who consumed what, and what the items are called."""

    name: str
    interactions: File
    items: File
    optional: frozenset[str] = frozenset()  # roles that may be missing, and `items` for the whole table


_MOVIE = ("movie id", "movie title", "release date", "video release date", "IMDb URL")
_GENRES = tuple(f"genre {n}" for n in range(19))
_RATING = {"user": "user", "item": "item", "weight": "rating", "time": "timestamp"}
_RATINGS = ("user", "item", "rating", "timestamp")
_OWN = {"user": "user", "item": "item", "weight": "weight", "time": "time"}
_TITLE = {"item": "item", "title": "title"}
_ATOMIC = ("item_id", "artist_id", "movie_id", "book_id", "business_id", "venue_id")
_LATEST = {"user": "userId", "item": "movieId", "weight": "rating", "time": "timestamp"}

LAYOUTS = (
    Layout(
        "Last.fm 2k (HetRec 2011)",
        File(
            "user_artists.dat",
            "\t",
            {"user": "userID", "item": "artistID", "weight": "weight"},
            ("userID", "artistID", "weight"),
        ),
        File("artists.dat", "\t", {"item": "id", "title": "name"}, ("id", "name", "url", "pictureURL")),
    ),
    Layout(
        "MovieLens 100k",
        File("u.data", "\t", _RATING, _RATINGS),
        File("u.item", "|", {"item": "movie id", "title": "movie title"}, _MOVIE + _GENRES, "latin-1"),
    ),
    Layout(
        "MovieLens 1M and 10M",
        File("ratings.dat", "::", _RATING, _RATINGS),
        File("movies.dat", "::", _TITLE, ("item", "title", "genres"), "latin-1"),
    ),
    Layout(
        "MovieLens latest, 20M, 25M and 32M",
        File("ratings.csv", ",", _LATEST),
        File("movies.csv", ",", {"item": "movieId", "title": "title"}),
    ),
    Layout(
        "RecBole's atomic files",
        File(
            "*.inter",
            "\t",
            {"user": "user_id", "item": _ATOMIC, "weight": ("rating", "weight"), "time": "timestamp"},
        ),
        File("*.item", "\t", {"item": _ATOMIC, "title": ("title", "name", "movie_title", "item_name", "artist_name")}),
        frozenset({"weight", "time", "items"}),
    ),
    *(
        Layout(
            f"one's own, {kind.upper()}",
            File(f"interactions.{kind}", delimiter, _OWN),
            File(f"items.{kind}", delimiter, _TITLE),
            frozenset({"weight", "time", "items"}),
        )
        for kind, delimiter in (("csv", ","), ("tsv", "\t"))
    ),
)


# Files of logs that are not read -> what to do.
_OTHERS = {
    "behaviors.tsv": "MIND's impressions are not read: write each click (N1-1 in its last column) as a row of an "
    "interactions.tsv with the columns user, item, time, and of news.tsv the first and fourth column as an items.tsv "
    "with the columns item, title (docs/data.md has the commands)",
    "*.parquet": "Parquet is not read as a log: write interactions.csv (user, item, weight, time) and items.csv (item, "
    "title), each by pyarrow.csv.write_csv(pyarrow.parquet.read_table(FILE), NAME)",
}


class Log(NamedTuple):
    """N rows of U users and I items, as the files have them."""

    user_ids: list[str]
    item_ids: list[str]
    titles: list[str]  # of the items; empty where the files have none
    users: np.ndarray  # [N] int32, into user_ids
    items: np.ndarray  # [N] int32, into item_ids
    weights: np.ndarray  # [N] float32
    times: np.ndarray | None  # [N] float64, seconds


def find_layout(directory: Path) -> Layout:
    """The layout whose interactions lie in `directory`.

    Raises:
      UserError: none or several do, or the titles are missing.
    """
    found = {path: layout for layout in LAYOUTS for path in sorted(directory.glob(layout.interactions.name))}
    if len(found) != 1:
        for pattern, remedy in _OTHERS.items():
            if not found and (others := sorted(directory.glob(pattern))):
                raise UserError(f"{others[0]}: {remedy}")
        known = "; ".join(f"{layout.interactions.name} ({layout.name})" for layout in LAYOUTS)
        there = " and ".join(path.name for path in found) if found else "no interactions"
        raise UserError(f"{directory}: holds {there}; it must hold one of {known}")
    (layout,) = found.values()
    if "items" not in layout.optional and not files(directory, layout)[1:]:
        raise UserError(f"{directory / layout.items.name}: not found; it has the titles of {layout.name}")
    return layout


def files(directory: Path, layout: Layout) -> list[Path]:
    """The files of a layout that are there: the interactions, and the items if there are any.

    Raises:
      UserError: several could be the items.
    """
    items = sorted(directory.glob(layout.items.name))
    if len(items) > 1:
        raise UserError(f"{directory}: holds {' and '.join(path.name for path in items)}; keep one")
    return [*directory.glob(layout.interactions.name), *items]


def read_log(directory: Path, bad: BadRecords) -> Log:
    """Reads the one layout that lies in `directory`.

    Raises:
      UserError: no layout, a malformed row, two titles for one item, or no interactions.
    """
    layout = find_layout(directory)
    path, *items_path = files(directory, layout)
    table, places = _open(path, layout, layout.interactions)
    user_numbers: dict[str, int] = {}
    item_numbers: dict[str, int] = {}
    users, items, weights, times = array.array("i"), array.array("i"), array.array("f"), array.array("d")
    user_at, item_at = places["user"], places["item"]
    weight_at, time_at = places.get("weight"), places.get("time")

    def parse(line: Line) -> tuple[str, str, float, float]:
        cells = table.cells(line)
        user, item = cells[user_at].strip(), cells[item_at].strip()
        if not user or not item:
            raise UserError(f"{line.place}: column {table.columns[item_at if user else user_at]!r} is empty")
        weight = 1.0 if weight_at is None else number(cells[weight_at], table.columns[weight_at], line.place)
        time = 0.0 if time_at is None else _time(cells[time_at], table.columns[time_at], line.place)
        return user, item, weight, time

    for user, item, weight, time in bad.parse(table.lines(), parse, table.path):
        users.append(user_numbers.setdefault(user, len(user_numbers)))
        items.append(item_numbers.setdefault(item, len(item_numbers)))
        weights.append(weight)
        times.append(time)
    if not users:
        raise UserError(f"{table.path}: holds no interactions")
    titles = _titles(items_path[0], layout, bad) if items_path else None
    return Log(
        list(user_numbers),
        list(item_numbers),
        list(item_numbers) if titles is None else [titles.get(item, "") for item in item_numbers],
        np.frombuffer(users, np.int32),
        np.frombuffer(items, np.int32),
        np.frombuffer(weights, np.float32),
        None if time_at is None else np.frombuffer(times, np.float64),
    )


def _open(path: Path, layout: Layout, file: File) -> tuple[Table, dict[str, int]]:
    """The table, and where in its rows each role stands."""
    table = open_table(path, file.delimiter, file.columns, file.encoding)
    names = [column.partition(":")[0] for column in table.columns]  # RecBole has a type behind each
    wanted = {role: (columns,) if isinstance(columns, str) else columns for role, columns in file.roles.items()}
    places = {role: names.index(each) for role, columns in wanted.items() for each in columns[::-1] if each in names}
    if missing := [" or ".join(wanted[role]) for role in wanted if role not in places.keys() | layout.optional]:
        raise UserError(f"{path}:1: the header lacks {missing}; it has {shortened(table.columns)}")
    return table, places


def _titles(path: Path, layout: Layout, bad: BadRecords) -> dict[str, str]:
    """Item -> title, without runs of white space."""
    table, places = _open(path, layout, layout.items)
    titles: dict[str, str] = {}

    def parse(line: Line) -> tuple[str, str]:
        cells = table.cells(line)
        item, title = cells[places["item"]].strip(), " ".join(cells[places["title"]].split())
        if titles.setdefault(item, title) != title:
            both = f"{title[:40]!r} here and {titles[item][:40]!r} above"
            raise UserError(f"{line.place}: item {item[:40]!r} is {both}; keep one")
        return item, title

    return dict(bad.parse(table.lines(), parse, table.path))


def _time(text: str, column: str, place: str) -> float:
    """Seconds since 1970 of a number of seconds, of a date and time in ISO 8601 (UTC where it names no zone), or of one
    as Microsoft's releases have it: 11/12/2019 2:14:46 PM, the month first.
    """
    text = text.strip()
    moment = None
    with contextlib.suppress(ValueError):
        if "-" in text:
            moment = datetime.datetime.fromisoformat(text)
        elif "/" in text:
            moment = datetime.datetime.strptime(text, "%m/%d/%Y %I:%M:%S %p")  # the zone follows
    if moment is not None:
        return moment.replace(tzinfo=moment.tzinfo or datetime.UTC).timestamp()
    if "/" in text or ":" in text:
        raise UserError(
            f"{place}: column {column!r} is {text[:40]!r}; write seconds, 2019-11-12T14:14:46 or 11/12/2019 2:14:46 PM"
        )
    return number(text, column, place)
