"""The head over the catalogue against NumPy, whole and sampled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close

from e2p_jax.config import ItemsConfig
from e2p_jax.prefix.items import Items

COUNT, GIVEN, WIDTH, R = 40, 6, 8, 5
RNG = np.random.default_rng(0)
STATES = (0.3 * RNG.normal(size=(2, 3, WIDTH))).astype(np.float32)
IDS = np.full((2, 3, 4), -1, np.int32)
IDS[0, 0, :4], IDS[0, 1, :1], IDS[1, 0, :2] = [3, 0, 39, 7], [12], [5, 6]


def head(**settings: int) -> Items:
    """With learned vectors that are not zero."""
    made = Items(ItemsConfig(width=R, **settings), items=COUNT, given_width=GIVEN, model_width=WIDTH, rngs=nnx.Rngs(0))
    for name in ("learned", "given", "query_bias", *(["said"] if made.settings.token else [])):
        variable = getattr(made, name)
        variable[...] = jnp.asarray(np.random.default_rng(1).normal(size=variable.shape), jnp.float32)
    made.query[...] = made.query[...] * 0.3  # so that a draw is not all of a sum's size
    return made


def expected(made: Items) -> np.ndarray:
    """Each segment's mean cross-entropy, [B, S]."""
    values = {name: np.asarray(getattr(made, name), np.float64) for name in ("query", "query_bias", "learned", "given")}
    rows = values["learned"] + values["given"] @ np.asarray(made.map, np.float64)
    unit = STATES / np.linalg.norm(STATES, axis=-1, keepdims=True)
    logits = (unit @ values["query"] + values["query_bias"]) @ rows.T
    log_total = np.log(np.exp(logits).sum(axis=-1))
    nll = np.zeros(STATES.shape[:2])
    for place in np.ndindex(nll.shape):
        mine = IDS[place][IDS[place] >= 0]
        nll[place] = np.mean([log_total[place] - logits[place][item] for item in mine]) if len(mine) else 0
    return nll


def test_the_whole_softmax_is_the_mean_cross_entropy() -> None:
    made = head()
    nll = jax.jit(lambda: made.nll(STATES, IDS, None))()
    assert_close(nll, expected(made))
    assert float(nll[1, 2]) == 0  # a segment without items
    longer = jax.jit(lambda: made.nll(100 * STATES, IDS, None))()  # of another backbone
    assert_close(longer, nll)


def test_the_sampled_softmax_has_no_bias() -> None:
    """The mean of the sampled sum over many draws is the sum; with all others in the draw it is near in each."""
    made = head(negatives=16)
    nll = expected(made)
    keys = jax.random.split(jax.random.key(1), 4000)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: made.nll(STATES, IDS, key)))(keys), np.float64)
    means = np.log(np.exp(drawn).mean(axis=0))
    assert drawn.std(axis=0)[0, 0] > 0.01  # keys draw anew
    named = (IDS >= 0).any(axis=-1)
    np.testing.assert_allclose(means[named], nll[named], atol=0.02)


@pytest.mark.parametrize("negatives", [COUNT, 16])
def test_gradients_are_finite(negatives: int) -> None:
    """Where a segment's items are among the drawn, too, and where it has none."""
    graph, state = nnx.split(head(negatives=negatives))
    grads = jax.jit(jax.grad(lambda s: jnp.sum(nnx.merge(graph, s).nll(STATES, IDS, jax.random.key(0)))))(state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_settings_keep_their_say() -> None:
    assert head().rows().shape == (COUNT, R)
    wide = dataclasses.replace(ItemsConfig(), width=7)
    made = Items(wide, items=2, given_width=3, model_width=4, rngs=nnx.Rngs(0))
    assert made.rows(jnp.array([1])).shape == (1, 7) and not hasattr(made, "token")


def test_an_items_token_is_a_map_of_its_row() -> None:
    made = head(token=True)
    rows = np.asarray(made.rows(), np.float64) + np.asarray(made.said, np.float64)
    of_rows = rows @ np.asarray(made.token, np.float64)
    assert_close(made.tokens(jnp.asarray([[3, 39], [0, 3]])), of_rows[[[3, 39], [0, 3]]])
    graph, state = nnx.split(made)
    grads = jax.grad(lambda s: jnp.sum(nnx.merge(graph, s).tokens(jnp.asarray([3]))))(state)
    assert not any(np.any(grads[name][...]) for name in ("learned", "map")) and np.any(grads["said"][...])  # words' own
