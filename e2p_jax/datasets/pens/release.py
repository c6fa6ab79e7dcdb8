"""The files of PENS, as they come: `news.tsv`, `train.tsv`, `valid.tsv` and `personalized_test.tsv`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from e2p_jax.datasets.bad_records import BadRecords
from e2p_jax.errors import UserError
from e2p_jax.text_files import Line, open_table

NEWS = ("News ID", "Category", "Topic", "Headline", "News body", "Title entity", "Entity content")
CLICKS = ("UserID", "ClicknewsID", "dwelltime", "exposure_time", "pos", "neg", "start", "end", "dwelltime_pos")
REWRITES = ("userid", "clicknewsID", "posnewID", "rewrite_titles")
NAMES = ("news.tsv", "train.tsv", "valid.tsv", "personalized_test.tsv")

Parsed = TypeVar("Parsed")


class Article(NamedTuple):
    """A headline, and the first words of the text below it; either may be empty."""

    headline: str
    body: str


class Impression(NamedTuple):
    """An impression: what a user had clicked, and clicked next."""

    user_id: str
    history: list[str]  # news ids, oldest first
    clicked: list[str]  # news ids


class Reader(NamedTuple):
    """A user of the test, and the headlines that this user wrote for articles."""

    user_id: str
    history: list[str]  # news ids
    rewrites: list[tuple[str, str]]  # news id, headline; the headline may be empty


def read_news(path: Path, body_words: int, bad: BadRecords) -> dict[str, Article]:
    """News id -> article.

    Raises:
      UserError: a malformed row, or an id that stands for two different articles.
    """
    news: dict[str, Article] = {}

    def parse(cells: list[str], place: str) -> tuple[str, Article]:
        news_id, headline = cells[0].strip(), " ".join(cells[3].split())
        if not news_id:
            raise UserError(f"{place}: column {NEWS[0]!r} is empty")
        article = Article(headline, " ".join(cells[4].split(maxsplit=body_words)[:body_words]))
        if news.get(news_id, article) != article:
            raise UserError(f"{place}: news id {news_id[:40]!r} has another article above; keep one")
        return news_id, article

    for news_id, article in _rows(path, NEWS, parse, bad):
        news[news_id] = article
    if not news:
        raise UserError(f"{path}: holds no news")
    return news


def read_impressions(path: Path, bad: BadRecords) -> Iterator[Impression]:
    """Yields the rows of `train.tsv` or `valid.tsv`.

    Raises:
      UserError: a malformed row.
    """

    def parse(cells: list[str], place: str) -> Impression:
        if not cells[0].strip():
            raise UserError(f"{place}: column {CLICKS[0]!r} is empty")
        return Impression(cells[0].strip(), cells[1].split(), cells[4].split())

    return _rows(path, CLICKS, parse, bad)


def read_rewrites(path: Path, bad: BadRecords) -> Iterator[Reader]:
    """Yields the rows of `personalized_test.tsv`.

    Raises:
      UserError: a malformed row.
    """

    def parse(cells: list[str], place: str) -> Reader:
        user, (history, asked) = cells[0].strip(), (_ids(cell) for cell in cells[1:3])
        titles = [" ".join(title.split()) for title in cells[3].split(";;")]
        if len(titles) == len(asked) + 1 and not titles[-1]:
            titles.pop()  # the separator also stands at the end
        if not user:
            raise UserError(f"{place}: column {REWRITES[0]!r} is empty")
        if len(titles) != len(asked):
            raise UserError(
                f"{place}: column {REWRITES[3]!r} has {len(titles)} titles, separated by ;;, "
                f"for {len(asked)} news ids in column {REWRITES[2]!r}"
            )
        return Reader(user, history, list(zip(asked, titles, strict=True)))

    return _rows(path, REWRITES, parse, bad)


def _ids(cell: str) -> list[str]:
    return [news_id.strip() for news_id in cell.split(",") if news_id.strip()]


def _rows(
    path: Path, columns: tuple[str, ...], parse: Callable[[list[str], str], Parsed], bad: BadRecords
) -> Iterator[Parsed]:
    table = open_table(path, "\t", columns)

    def parse_line(line: Line) -> Parsed:
        return parse(table.cells(line), line.place)

    return bad.parse(table.lines(), parse_line, path)
