"""Items as tokens of an output vocabulary of their own: a softmax over the catalogue, where a reply begins."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from e2p_jax.config import ItemsConfig
from e2p_jax.prefix.projector import TINY, Statistic
from e2p_jax.products import einsum


class Items(nnx.Module):
    """A catalogue of I items.

    An item's row is a learned vector, at first zero, plus a map of the vector that its table gives: an item that nobody
    was trained on has its place by the latter. Its logit is the row times the query, a map of the direction of the
    hidden state that predicts the reply's first token. Computed in float32.
    """

    def __init__(self, settings: ItemsConfig, *, items: int, given_width: int, model_width: int, rngs: nnx.Rngs):
        width = settings.width
        self.settings = settings
        self.query = nnx.Param(jax.random.normal(rngs.params(), (model_width, width)))
        self.query_bias = nnx.Param(jnp.zeros((width,)))  # times the row, it is how popular an item is
        self.map = nnx.Param((given_width * width) ** -0.5 * jax.random.normal(rngs.params(), (given_width, width)))
        self.learned = nnx.Param(jnp.zeros((items, width)))
        if settings.token:
            self.said = nnx.Param(jnp.zeros((items, width)))  # what words learn of an item, apart from its rank
            self.token = nnx.Param(jax.random.normal(rngs.params(), (width, model_width)))  # a first row's length is 1
        self.given = Statistic(jnp.zeros((items, given_width)))

    def queries(self, states: jax.Array) -> jax.Array:
        """[B, S, D] hidden states -> [B, S, R] float32."""
        bias, states = self.query_bias[...][None, None], states.astype(jnp.float32)
        # Of length 1: backbones differ in how long their states are, and a step would be as much larger.
        unit = states * jax.lax.rsqrt(jnp.sum(jnp.square(states), axis=-1, keepdims=True) + TINY)
        return einsum("bsd,dr->bsr", unit, self.query[...]) + bias

    def rows(self, ids: jax.Array | None = None) -> jax.Array:
        """[..., R] float32, of items [...], or of all of them."""
        learned, given = self.learned[...], self.given[...]
        if ids is not None:
            learned, given = learned[ids], given[ids]
        return learned + einsum("...g,gr->...r", given, self.map[...])

    def tokens(self, ids: jax.Array) -> jax.Array:
        """[..., D] float32, of items [...]: at first of unit variance. Words do not move rows."""
        rows = jax.lax.stop_gradient(self.rows(ids)) + self.said[...][ids]
        return einsum("...r,rd->...d", rows, self.token[...])

    def nll(self, states: jax.Array, ids: jax.Array, key: jax.Array | None) -> jax.Array:
        """Mean cross-entropy of each segment's items, in nats, 0 where it has none.

        In a catalogue of more than `negatives` items the sum over all others is that over as many drawn uniformly,
        times what they stand for: without bias, where log q is subtracted from each one's logit (Bengio & Senecal,
        2008). The segment's own items are always in, and not among the drawn.

        Args:
          states: [B, S, D].
          ids: [B, S, N] int32, distinct, -1 where there is none.
          key: draws the others; without one, always the same are drawn.

        Returns:
          [B, S] float32.
        """
        queries, there = self.queries(states), ids >= 0
        own, count, most = jnp.maximum(ids, 0), self.learned[...].shape[0], self.settings.negatives
        if count <= most:
            logits = einsum("bsr,ir->bsi", queries, self.rows())
            total, own_logits = jax.nn.logsumexp(logits, axis=-1), jnp.take_along_axis(logits, own, axis=-1)
        else:
            own_logits = einsum("bsr,bsnr->bsn", queries, self.rows(own))
            drawn = jax.random.randint(jax.random.key(0) if key is None else key, (most,), 0, count, jnp.int32)
            logits = einsum("bsr,mr->bsm", queries, self.rows(drawn)) + np.float32(np.log(count / most))
            is_own = (ids[:, :, None, :] == drawn[None, None, :, None]).any(axis=-1)
            logits = jnp.concatenate([jnp.where(is_own, -jnp.inf, logits), jnp.where(there, own_logits, -jnp.inf)], -1)
            total = jax.nn.logsumexp(logits, axis=-1)
        named = jnp.sum(there, axis=-1)
        mean = jnp.sum(jnp.where(there, own_logits, 0.0), axis=-1) / jnp.maximum(named, 1).astype(jnp.float32)
        return jnp.where(named > 0, total - mean, 0.0)
