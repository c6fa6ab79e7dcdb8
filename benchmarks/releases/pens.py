"""Synthetic news in PENS's format, and the readers' vectors: `python benchmarks/releases/pens.py DIR`.

Everything here is made up. An article tells of two things, and there are headlines on the one and on the other, in four
styles. A reader cares for some topics and for one style, and clicks, or writes, the headline on the thing and in the
style that fits. So the article alone leaves eight headlines open, and the reader's vector settles which.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from e2p_jax.datasets import synthetic
from e2p_jax.datasets.pens.release import CLICKS, NEWS, REWRITES
from e2p_jax.files import replace_directory

TOPICS = sorted(synthetic.TOPICS)
STYLES = ("all about {}", "why i love {}", "do you like {}?", "my favorite {}")
WIDTH = 64  # of a reader's vector
CARED_FOR = len(TOPICS) // 2  # topics


class Thing(NamedTuple):
    """What an article tells of."""

    topic: str
    value: str


def reader(user: int, seed: int = 0) -> tuple[set[str], str]:
    """The topics a reader cares for, and the style."""
    rng = np.random.default_rng([seed, 1, user])
    return {TOPICS[n] for n in rng.permutation(len(TOPICS))[:CARED_FOR]}, STYLES[rng.integers(len(STYLES))]


def vector(user: int, seed: int = 0) -> np.ndarray:
    """[WIDTH] float32: a fixed random direction for every topic and the style, added up, plus a little noise."""
    names = [*TOPICS, *STYLES]
    directions = np.random.default_rng([seed, 2]).normal(size=(len(names), WIDTH))
    topics, style = reader(user, seed)
    mine = sum(directions[names.index(name)] for name in (*topics, style))
    noise = 0.1 * np.random.default_rng([seed, 3, user]).normal(size=WIDTH)
    return ((mine + noise) / np.sqrt(CARED_FOR + 1)).astype(np.float32)


def article(number: int, seed: int = 0) -> tuple[Thing, Thing]:
    """Two things of different topics."""
    rng = np.random.default_rng([seed, 4, number])
    topics = [TOPICS[n] for n in rng.permutation(len(TOPICS))[:2]]
    one, two = (Thing(topic, str(rng.choice(synthetic.TOPICS[topic][0].split()))) for topic in topics)
    return one, two


def body(things: tuple[Thing, Thing], number: int, seed: int = 0) -> str:
    """What a persona would say of the two things, in either order."""
    rng = np.random.default_rng([seed, 5, number])
    said = [str(rng.choice(synthetic.TOPICS[thing.topic][1])).format(v=thing.value) for thing in things]
    return " ".join(said)


def write(directory: Path, users: int = 2000, articles: int = 2000, clicks: int = 4, seed: int = 0) -> None:
    """Writes the four files and `vectors.npz`, a table of user vectors.

    A tenth of the users are those of `valid.tsv`; 103 more are those of `personalized_test.tsv`, 10 headlines each.

    Args:
      users: How many readers click; those of the test come on top.
      articles: How many there are; every one has eight news ids, one a headline.
      clicks: Impressions of each reader.
      seed: Of everything random.
    """
    rng = np.random.default_rng([seed, 6])
    things = [article(number, seed) for number in range(articles)]
    news = [
        (_id(number, which, style), "synthetic", things[number][which].topic, _headline(things[number][which], style),
         body(things[number], number, seed), "{}", "{}")
        for number in range(articles) for which in (0, 1) for style in STYLES
    ]  # fmt: skip

    def fitting(user: int, count: int) -> list[tuple[int, int, str]]:
        """Article, thing and style of `count` headlines that fit: on articles that tell of one thing cared for."""
        topics, style = reader(user, seed)
        found: list[tuple[int, int, str]] = []
        for number in rng.permutation(articles):
            cared = [thing.topic in topics for thing in things[number]]
            if sum(cared) == 1:
                found.append((int(number), cared.index(True), style))
            if len(found) == count:
                break
        return found

    impressions: list[tuple[str, ...]] = []
    for user in range(users):
        chosen = fitting(user, 10 + clicks)
        history = [_id(*each) for each in chosen[:10]]
        for number, which, style in chosen[10:]:
            others = [_id(number, which, other) for other in STYLES if other != style] + [_id(number, 1 - which, style)]
            impressions.append(
                (f"U{user}", " ".join(history), " ".join(["9"] * 10), "#TAB#".join(["1/1/2020 9:00:00 AM"] * 10),
                 _id(number, which, style), " ".join(others), "1/2/2020 9:00:00 AM", "1/2/2020 9:05:00 AM", "9")
            )  # fmt: skip
    held_out = users // 10 * clicks
    tests = []
    for user in range(users, users + 103):
        chosen = fitting(user, 20)
        titles = ";;".join(_headline(things[number][which], style) for number, which, style in chosen[10:])
        ids = (",".join(_id(*each) for each in part) for part in (chosen[:10], chosen[10:]))
        tests.append((f"NT{user - users + 1}", *ids, titles))
    names = [f"U{user}" for user in range(users)] + [f"NT{number}" for number in range(1, 104)]
    with replace_directory(directory) as temporary:
        _write(temporary / "news.tsv", NEWS, news)
        _write(temporary / "train.tsv", CLICKS, impressions[held_out:])
        _write(temporary / "valid.tsv", CLICKS, impressions[:held_out])
        _write(temporary / "personalized_test.tsv", REWRITES, tests)
        vectors = np.stack([vector(user, seed) for user in range(users + 103)])
        np.savez(temporary / "vectors.npz", ids=np.array(names), embeddings=vectors)


def _id(number: int, which: int, style: str) -> str:
    return f"N{number * 8 + which * 4 + STYLES.index(style)}"


def _headline(thing: Thing, style: str) -> str:
    return style.format(thing.value)


def _write(path: Path, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    path.write_text("".join("\t".join(row) + "\n" for row in [columns, *rows]), encoding="utf-8", newline="")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
