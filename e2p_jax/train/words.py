"""Begins a projector with words (`projector.start`): its first soft tokens are a linear guess at what users' texts say.

The bag of a text is the sum of its tokens' embeddings, each times log((1 + N) / n)^2 where n of all N texts hold it, so
that rare words speak. A bag has the root mean square of a first soft token (`projector.init_scale`). The K soft tokens
share out a user's texts as `e2p embed --blocks K` does. Over all of these, with X the standardised vectors and Y the
bags, both less their means, a ridge regression gives

    y = mean + g x W,    W = (X'X + 3 E I)^-1 X'Y,    g = |Y| / |X W|

3 E is the best for vectors that tell a quarter of what varies in a bag, as MiniLM's do. It draws all guesses towards
the mean; g gives them the spread of the bags back, and soft tokens their length.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import scipy.sparse
from transformers import PreTrainedTokenizerBase

from e2p_jax.datasets.bad_records import BadRecords
from e2p_jax.datasets.prepared import stream_records
from e2p_jax.embed.contexts import in_blocks
from e2p_jax.errors import UserError
from e2p_jax.parallel import distributed
from e2p_jax.parallel.mesh import replicated
from e2p_jax.prefix.projector import TINY, kind_of
from e2p_jax.train.setup import Inputs, Model, place

_RIDGE = 3.0  # times E
_TEXTS = 1 << 12  # that are tokenised at once
_BYTES = 1 << 26  # of bags at once


def begin_with_words(model: Model, inputs: Inputs, users: Iterable[str]) -> Model:
    """The model with other first parameters of its projector. Every process calls it, and all get the same.

    Args:
      users: who are trained on; each counts once, by the first record with a context.

    Raises:
      UserError: none of them has a vector and a context.
    """
    settings, table, k = inputs.config.projector, inputs.table, inputs.config.projector.own_tokens
    assert table is not None  # the condition reads it
    found, where, texts, shares = _texts(inputs, set(users))
    rows = table.rows(found, where)
    shares, rows = shares[np.repeat(rows >= 0, k)], rows[rows >= 0]
    if not len(rows):
        raise UserError(
            f"{inputs.config.data.path}: no record of a training user with a vector has a context, whose words "
            "projector.start=words reads; give records `context`, or set projector.start=random"
        )
    counts, tokens = _counts(texts, inputs.encoder.tokenizer)
    read = jax.jit(lambda table: table[tokens], out_shardings=replicated(model.mesh))
    embeddings = np.asarray(read(model.params["backbone"]["embedding"])).astype(np.float32)
    own = {name: np.asarray(value) for name, value in model.params["projector"].items()}
    unit = np.sqrt(np.mean(np.square(own["token_mean"]) + np.square(own["token_std"])))

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """[n, E] standardised vectors, and [n, K, D] bags."""
        size = max(_BYTES // (4 * k * embeddings.shape[1]), 1)
        for first in range(0, len(rows), size):
            x = (table.gather(rows[first : first + size]) - own["input_mean"]) / own["input_std"]
            bags = (shares[k * first : k * (first + len(x))] @ counts) @ embeddings
            root = np.sqrt(np.mean(np.square(bags), axis=-1, keepdims=True))
            yield x, (unit * bags / np.maximum(root, TINY)).reshape(len(x), k, -1)

    def fitted(inward: int, outward: int) -> tuple[np.ndarray, np.ndarray]:
        weight, bias = ridge((x.reshape(-1, inward), y.reshape(-1, outward)) for x, y in pairs())
        mean, std = (np.tile(own[name], outward // embeddings.shape[1]) for name in ("token_mean", "token_std"))
        by = np.where(std > 0, 1 / np.maximum(std, TINY), 0)  # what the network gives is scaled by it
        return weight * by, (bias - mean) * by

    kind: Any = kind_of(settings.kind)  # has `begin`, says `Config.validate`
    begun = {name: value.astype(np.float32) for name, value in kind.begin(own, fitted).items()}
    begun = distributed.of_first(begun)
    projector = {name: place(begun[name], value.sharding) for name, value in model.params["projector"].items()}
    return dataclasses.replace(model, params={**model.params, "projector": projector})


def ridge(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The regression above, in float64 from products of the parts.

    Args:
      pairs: [n, E] and [n, D] float32, part after part.

    Returns:
      W times g [E, D], and what is added [D].
    """
    sums: list[Any] = [np.float64(0)] * 6  # to which float32 is added in float64
    for x, y in pairs:
        more = len(x), x.sum(axis=0), y.sum(axis=0), x.T @ x, x.T @ y, np.square(y).sum()
        sums = [old + new for old, new in zip(sums, more, strict=True)]
    count, mean_x, mean_y = sums[0], sums[1] / sums[0], sums[2] / sums[0]
    inner, cross = sums[3] - count * np.outer(mean_x, mean_x), sums[4] - count * np.outer(mean_x, mean_y)
    weight = np.linalg.solve(inner + _RIDGE * len(inner) * np.eye(len(inner)), cross)
    spread, guessed = sums[5] - count * np.square(mean_y).sum(), np.sum(weight * (inner @ weight))
    weight *= np.sqrt(max(spread, 0.0) / max(guessed, TINY))
    return weight, mean_y - mean_x @ weight


def _texts(inputs: Inputs, users: set[str]) -> tuple[list[str], list[str], list[str], scipy.sparse.csr_array]:
    """Users with a context, where it stands, all different texts, and which of them are in a user's K parts
    [users * K, texts].
    """
    data, blocks = inputs.config.data, inputs.config.projector.own_tokens
    bad = BadRecords(data.on_bad_record, data.max_bad_share, "--data.on_bad_record")
    numbers: dict[str, int] = {}
    found, where, held, ends = [], [], [], [0]
    for record in stream_records(data.path, data.train_split, bad):
        context = tuple(text for text in record.context if text.strip())
        if context and record.user_id in users:
            users.remove(record.user_id)
            found.append(record.user_id)
            where.append(record.source)
            for part in in_blocks(context, blocks):
                held += [numbers.setdefault(text, len(numbers)) for text in part]
                ends.append(len(held))
    shape = len(ends) - 1, len(numbers)
    return found, where, list(numbers), scipy.sparse.csr_array((np.ones(len(held), np.float32), held, ends), shape)


def _counts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[scipy.sparse.csr_array, np.ndarray]:
    """How often each text has a token, times the token's weight [texts, tokens]; and the ids of the tokens."""
    held, ends = [], [0]
    for first in range(0, len(texts), _TEXTS):
        spaced = [f" {text}" for text in texts[first : first + _TEXTS]]  # a word as it is inside a sentence
        for ids in tokenizer(spaced, add_special_tokens=False, verbose=False)["input_ids"]:
            held += ids
            ends.append(len(held))
    tokens, numbers = np.unique(np.array(held, np.int32), return_inverse=True)
    shape = len(texts), len(tokens)
    counts = scipy.sparse.csr_array((np.ones(len(held), np.float32), numbers, ends), shape)
    counts.sum_duplicates()
    weights = np.log((1 + len(texts)) / np.bincount(counts.indices)) ** 2
    counts.data *= weights.astype(np.float32)[counts.indices]
    return counts, tokens
