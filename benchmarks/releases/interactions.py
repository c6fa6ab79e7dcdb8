"""A synthetic log of plays, and the listeners' vectors: `python benchmarks/releases/interactions.py DIR`.

Everything here is made up. An item is an episode on one subject ("dog", "jazz"), and its title is a sentence that the
embedded backbone has met as an answer; a listener likes a few subjects and mostly plays episodes on those. So a
listener's vector tells what comes next, popularity tells little, and a model must read the vector to rank titles.
"""

import csv
import sys
from pathlib import Path

import numpy as np

from e2p_jax.datasets import synthetic
from e2p_jax.files import replace_directory

SUBJECTS = [(topic, subject) for topic in sorted(synthetic.TOPICS) for subject in synthetic.TOPICS[topic][0].split()]
WIDTH = 64  # of a listener's vector
LIKED = 4  # subjects
FIT = 6.0  # how much more, in nats, a listener plays what is liked


def catalogue(items: int, seed: int = 0) -> list[tuple[str, int]]:
    """Title and number of the subject of each item; no title stands twice."""
    titles: dict[str, int] = {}
    for number, (topic, subject) in enumerate(SUBJECTS):
        for answer in synthetic.TOPICS[topic][3]:
            titles.setdefault(answer.format(v=subject), number)
    every = list(titles.items())
    chosen = np.random.default_rng([seed, 0]).permutation(len(every))[:items]
    return [every[place] for place in chosen]


def likes(user: int, seed: int = 0) -> np.ndarray:
    """[subjects] bool: what a listener likes."""
    rng = np.random.default_rng([seed, 1, user])
    return np.isin(np.arange(len(SUBJECTS)), rng.permutation(len(SUBJECTS))[:LIKED])


def vector(user: int, seed: int = 0) -> np.ndarray:
    """[WIDTH] float32: a fixed random direction for every liked subject, added up, plus a little noise."""
    directions = np.random.default_rng([seed, 2]).normal(size=(len(SUBJECTS), WIDTH))
    mine = likes(user, seed)
    noise = 0.1 * np.random.default_rng([seed, 3, user]).normal(size=WIDTH)
    return ((mine @ directions + noise) / np.sqrt(mine.sum())).astype(np.float32)


def write(directory: Path, users: int = 2000, items: int = 500, plays: int = 12, seed: int = 0) -> None:
    """Writes `interactions.csv`, `items.csv`, and `vectors.npz`, a table of user vectors.

    Args:
      users: How many listeners.
      items: How many items there are to play, at most 580.
      plays: Different items that each plays.
      seed: Of everything random.
    """
    episodes = catalogue(items, seed)
    subjects = np.array([subject for _, subject in episodes])
    rng = np.random.default_rng([seed, 4])
    popularity = -np.log(np.arange(1, len(episodes) + 1)) / 2
    rows = []
    for user in range(users):
        # Gumbel noise makes the order a draw without replacement.
        appeal = FIT * likes(user, seed)[subjects] + popularity + rng.gumbel(size=len(episodes))
        played = rng.permutation(np.argsort(-appeal)[:plays])
        times = np.sort(rng.integers(1_600_000_000, 1_700_000_000, size=plays))
        rows += [(f"u{user}", f"i{item}", 1 + rng.poisson(3), time) for item, time in zip(played, times, strict=True)]
    with replace_directory(directory) as temporary:
        titles = [(f"i{number}", title) for number, (title, _) in enumerate(episodes)]
        for name, header, lines in (("interactions", "user,item,weight,time", rows), ("items", "item,title", titles)):
            with (temporary / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([header.split(","), *lines])
        ids = np.array([f"u{user}" for user in range(users)])
        np.savez(temporary / "vectors.npz", ids=ids, embeddings=np.stack([vector(u, seed) for u in range(users)]))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
