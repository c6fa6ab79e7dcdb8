"""User vector -> soft tokens."""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from flax import nnx


class Statistic(nnx.Variable):
    """A constant measured before training and kept with the projector; never trained."""


class Projector(nnx.Module):
    """[..., E] -> [..., K, D].

    `mlp` is the two-layer SiLU network with a linear residual and dropout that the field settled on;
    `linear` is the residual alone. Vectors are standardised first, so a fresh network's output has about unit
    variance a dimension; it is then moved to the mean and scaled to the spread of the backbone's own token embeddings
    (`calibrate`), so the frozen layers see an ordinary-looking token from the first step. Computed in float32.

    With `null_user_rate` there is a null user: a learned vector, at first the mean user's, in place of vectors that are
    NaN (users who have none) and, in training, of that share of all others.
    """

    def __init__(
        self,
        *,
        embedding_width: int,
        model_width: int,
        num_tokens: int,
        kind: Literal["mlp", "linear"],
        hidden_size: int,
        dropout: float,
        noise: float = 0.0,
        null_user_rate: float = 0.0,
        rngs: nnx.Rngs,
    ):
        e, d, k = embedding_width, model_width, num_tokens

        def matrix(rows: int, columns: int, gain: float) -> nnx.Param:
            return nnx.Param(gain * rows**-0.5 * jax.random.normal(rngs.params(), (rows, columns)))

        self.kind, self.num_tokens = kind, num_tokens
        self.dropout, self.noise, self.null_user_rate = dropout, noise, null_user_rate
        # Of unit output variance, the residual gets one half and the MLP (SiLU of a unit normal has second
        # moment 0.356) the other.
        share = 0.5**0.5 if kind == "mlp" else 1.0
        self.skip = matrix(e, k * d, share)
        self.bias = nnx.Param(jnp.zeros((k * d,)))
        if kind == "mlp":
            self.up = matrix(e, hidden_size, 1.0)
            self.up_bias = nnx.Param(jnp.zeros((hidden_size,)))
            self.down = matrix(hidden_size, k * d, share * 0.356**-0.5)
        if null_user_rate:
            self.null_user = nnx.Param(jnp.zeros((e,)))  # standardised
        self.input_mean = Statistic(jnp.zeros((e,)))
        self.input_std = Statistic(jnp.ones((e,)))
        self.token_mean = Statistic(jnp.zeros((d,)))
        self.token_std = Statistic(jnp.ones((d,)))

    def __call__(self, vectors: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """Projects user vectors.

        Args:
          vectors: [..., E] float32, as they stand in the table; NaN for the null user, where there is one.
          dropout_key: turns dropout, noise on the standardised vectors, and dropping users, on.

        Returns:
          [..., K, D] float32.
        """
        chex.assert_axis_dimension(vectors, -1, self.input_mean[...].shape[0])
        lead = (1,) * (vectors.ndim - 1)
        if dropout_key is not None:  # one key a purpose
            dropout_key, noise_key, null_key = jax.random.split(dropout_key, 3)

        def row(variable: nnx.Variable) -> jax.Array:  # strict rank promotion: [N] -> [1, .., N]
            return variable[...].reshape(*lead, -1)

        x = (vectors - row(self.input_mean)) / row(self.input_std)
        if dropout_key is not None and self.noise:
            x = x + self.noise * jax.random.normal(noise_key, x.shape)
        if self.null_user_rate:
            is_null = jnp.isnan(vectors[..., :1])
            if dropout_key is not None:
                is_null = is_null | jax.random.bernoulli(null_key, self.null_user_rate, is_null.shape)
            x = jnp.where(is_null, row(self.null_user), x)
        y = x @ self.skip[...] + row(self.bias)
        if self.kind == "mlp":
            h = jax.nn.silu(x @ self.up[...] + row(self.up_bias))
            if dropout_key is not None and self.dropout:
                keep = jax.random.bernoulli(dropout_key, 1 - self.dropout, h.shape)
                h = jnp.where(keep, h / (1 - self.dropout), 0.0)
            y = y + h @ self.down[...]
        y = y.reshape(*vectors.shape[:-1], self.num_tokens, -1)
        lead = (1,) * vectors.ndim
        return row(self.token_mean) + row(self.token_std) * y

    def calibrate(self, mean: jax.Array, std: jax.Array, token_embeddings: jax.Array, scale: float) -> None:
        """Sets the statistics.

        Args:
          mean: [E] float32, of the training users' vectors (`e2p_jax.vectors.population`).
          std: [E] float32, greater than 0.
          token_embeddings: [V, D] of the backbone.
          scale: root mean square of the soft tokens, in units of the token embeddings.
        """
        self.input_mean[...] = mean
        self.input_std[...] = std
        tokens = token_embeddings.astype(jnp.float32)
        self.token_mean[...] = scale * jnp.mean(tokens, axis=0)
        self.token_std[...] = scale * jnp.std(tokens, axis=0)
