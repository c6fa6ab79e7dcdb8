"""User vector -> soft tokens: what the kinds of projector (`registry.PROJECTORS`) share."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from e2p_jax.config import ProjectorConfig
from e2p_jax.registry import PROJECTORS

TINY = 1e-20  # in place of nothing, which does not divide and whose root has no slope

Make = Callable[..., jax.Array]  # (*shape) -> float32


class Statistic(nnx.Variable):
    """A constant measured before training and kept with the projector; never trained."""


class Kind(Protocol):
    """The names that the module of a kind defines. It is light: it imports jax inside its functions."""

    Settings: type[ProjectorConfig]
    """Its section of the config, with fields of its own."""
    TORCH_NAMES: Mapping[str, str]
    """Parameter -> its name in the exported model, where that is another; torch holds the transpose."""
    TORCH: str
    """Source that puts a class in PROJECTORS at the end of the exported modeling_e2p.py, with its two methods; its
    config has the kind's own fields as `projector_FIELD`."""

    def parameters(self, rows: int, columns: int, settings: Any, normal: Make, zeros: Make) -> dict[str, jax.Array]:
        """Fresh parameters by name, for `rows` = E and `columns` = K*D, with an output of unit variance.

        Weight decay reaches those of two axes or more; a `bias` beside a `skip` [E, ...] learns sqrt(E) times as fast.
        """

    def project(self, projector: Any, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        """Standardised vectors [..., E] -> [..., K*D]; parameters and `settings` are attributes of the projector.

        A kind may also have `project_numpy(parameters by name, x [N, E])`, for users seen just now (`PrefixTable`).
        One with `begin(parameters by name, fitted)` -> parameters may start from words: `fitted(E, K*D)` is the linear
        map to begin as, W [E, K*D] and b [K*D], and `fitted(E/K, D)` one for all of K parts of a vector.
        """


def kind_of(name: str) -> Kind:
    """The module of a kind."""
    kind: Kind = PROJECTORS[name].load()
    return kind


class Projector(nnx.Module):
    """[..., E] -> [..., K, D].

    Vectors are standardised first, so a fresh network's output has about unit variance a dimension; it is then moved to
    the mean and scaled to the spread of the backbone's own token embeddings (`calibrate`), so the frozen layers see an
    ordinary-looking token from the first step. Computed in float32.

    With `max_scale` no user vector, however far from those of training, gives a soft token longer than the bound. The
    clip is hard: below the bound a token is what it is without one, above it the direction still learns.

    With `null_user_rate` there is a null user: a learned vector, at first the mean user's, in place of vectors that are
    NaN (users who have none) and, in training, of that share of all others.
    """

    def __init__(
        self,
        settings: ProjectorConfig,
        *,
        embedding_width: int,
        model_width: int,
        null_user_rate: float = 0.0,
        rngs: nnx.Rngs,
    ):
        e, d, k = embedding_width, model_width, settings.num_tokens

        def normal(*shape: int) -> jax.Array:
            return jax.random.normal(rngs.params(), shape)

        def zeros(*shape: int) -> jax.Array:
            return jnp.zeros(shape)

        self.settings, self.num_tokens, self.null_user_rate = settings, k, null_user_rate
        for name, value in (
            kind_of(settings.kind).parameters(e, settings.own_tokens * d, settings, normal, zeros).items()
        ):
            setattr(self, name, nnx.Param(value))
        if settings.shared_tokens:
            self.shared = nnx.Param(zeros(settings.shared_tokens * d))
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
        if dropout_key is not None:  # one key a purpose
            dropout_key, noise_key, null_key = jax.random.split(dropout_key, 3)
        x = (vectors - self.row("input_mean", vectors)) / self.row("input_std", vectors)
        if dropout_key is not None and self.settings.noise:
            x = x + self.settings.noise * jax.random.normal(noise_key, x.shape)
        if self.null_user_rate:
            is_null = jnp.isnan(vectors[..., :1])
            if dropout_key is not None:
                is_null = is_null | jax.random.bernoulli(null_key, self.null_user_rate, is_null.shape)
            x = jnp.where(is_null, self.row("null_user", x), x)
        y = kind_of(self.settings.kind).project(self, x, dropout_key)
        if self.settings.shared_tokens:
            y = jnp.concatenate(
                [y, jnp.broadcast_to(self.row("shared", y), (*y.shape[:-1], self.shared.shape[0]))], axis=-1
            )
        return self.placed(y.reshape(*vectors.shape[:-1], self.num_tokens, -1))

    def placed(self, y: jax.Array) -> jax.Array:
        """[..., D] of unit variance -> soft tokens among the token embeddings, none longer than the bound."""
        soft = self.row("token_mean", y) + self.row("token_std", y) * y
        if not self.settings.max_scale:
            return soft
        # By the largest first: float32 holds no squares from 2e19 on. A token that is not finite stays so.
        size = jax.lax.stop_gradient(jnp.maximum(jnp.max(jnp.abs(soft), axis=-1, keepdims=True), TINY))
        unit = soft / size
        root = jnp.sqrt(jnp.maximum(jnp.mean(jnp.square(unit), axis=-1, keepdims=True), TINY))
        return jnp.where(size * root > self.bound, unit * (self.bound / root), soft)

    @property
    def bound(self) -> jax.Array:
        """[] float32: the largest root mean square of a soft token."""
        # The statistics are those of the token embeddings times `init_scale`.
        calibrated = jnp.mean(jnp.square(self.token_mean[...]) + jnp.square(self.token_std[...]))
        return self.settings.max_scale / self.settings.init_scale * jnp.sqrt(calibrated)

    def row(self, name: str, x: jax.Array) -> jax.Array:
        """A variable [N] as [1, .., N], of the rank of `x`: rank promotion is strict."""
        return getattr(self, name)[...].reshape((1,) * (x.ndim - 1) + (-1,))  # type: ignore[no-any-return]

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
