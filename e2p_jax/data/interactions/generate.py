"""A synthetic log of plays, and the listeners' vectors: `python -m e2p_jax.data.interactions.generate DIR`.

Everything here is made up. An item is a piece of music of one style, on one instrument, in one city, and says so in its
title; a listener likes two of each and mostly plays what fits. So a listener's vector tells what comes next, popularity
tells little, and a model must read the vector to rank titles.
"""

import csv
import itertools
import sys
from pathlib import Path

import numpy as np

from e2p_jax.data import synthetic
from e2p_jax.files import replace_directory

FACETS = tuple(synthetic.TOPICS[topic][0].split() for topic in ("music", "instrument", "city"))
WIDTH = 64  # of a listener's vector
LIKED = 2  # values of each facet
FIT = 3.0  # how much more, in nats, a listener plays what fits one more facet


def titles(items: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """The facets of each item: different for every one."""
    every = list(itertools.product(*FACETS))
    chosen = np.random.default_rng([seed, 0]).permutation(len(every))[:items]
    return [every[number] for number in chosen]


def likes(user: int, seed: int = 0) -> list[list[str]]:
    """What a listener likes, facet by facet."""
    rng = np.random.default_rng([seed, 1, user])
    return [[facet[n] for n in rng.permutation(len(facet))[:LIKED]] for facet in FACETS]


def vector(user: int, seed: int = 0) -> np.ndarray:
    """[WIDTH] float32: a fixed random direction for every liked value, added up, plus a little noise."""
    values = [value for facet in FACETS for value in facet]
    directions = np.random.default_rng([seed, 2]).normal(size=(len(values), WIDTH))
    mine = sum(directions[values.index(value)] for liked in likes(user, seed) for value in liked)
    noise = 0.1 * np.random.default_rng([seed, 3, user]).normal(size=WIDTH)
    return ((mine + noise) / np.sqrt(len(FACETS) * LIKED)).astype(np.float32)


def write(directory: Path, users: int = 2000, items: int = 400, plays: int = 20, seed: int = 0) -> None:
    """Writes `interactions.csv`, `items.csv`, and `vectors.npz`, a table of user vectors.

    Args:
      users: How many listeners.
      items: How many items there are to play, at most 1,680.
      plays: Different items that each plays.
      seed: Of everything random.
    """
    catalogue = titles(items, seed)
    rng = np.random.default_rng([seed, 4])
    popularity = np.log(1 / np.arange(1, items + 1)) / 2
    rows = []
    for user in range(users):
        liked = likes(user, seed)
        fit = np.array([sum(value in good for value, good in zip(item, liked, strict=True)) for item in catalogue])
        # Gumbel noise makes the order a draw without replacement.
        order = np.argsort(-(FIT * fit + popularity + rng.gumbel(size=items)))[:plays]
        times = np.sort(rng.integers(1_600_000_000, 1_700_000_000, size=plays))
        rows += [
            (f"u{user}", f"i{i}", 1 + rng.poisson(3), t) for i, t in zip(rng.permutation(order), times, strict=True)
        ]
    with replace_directory(directory) as temporary:
        songs = [(f"i{number}", f"{style} {tool} in {city}") for number, (style, tool, city) in enumerate(catalogue)]
        for name, header, lines in (("interactions", "user,item,weight,time", rows), ("items", "item,title", songs)):
            with (temporary / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([header.split(","), *lines])
        ids = np.array([f"u{user}" for user in range(users)])
        np.savez(temporary / "vectors.npz", ids=ids, embeddings=np.stack([vector(u, seed) for u in range(users)]))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
