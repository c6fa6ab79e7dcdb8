"""Pure train and evaluation steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from e2p_jax.prefix.model import Batch, PrefixModel
from e2p_jax.train.partition import join

PyTree = Any


class TrainState(NamedTuple):
    """What a step changes, and a checkpoint keeps."""

    step: jax.Array  # [] int32, steps done
    trainable: PyTree
    optimizer: optax.OptState
    key: jax.Array  # typed PRNG key; each step folds its number in


class Metrics(NamedTuple):
    """Scalars of one step, float32."""

    loss: jax.Array  # nats a target
    grad_norm: jax.Array  # of the trainable part, before the clip
    learning_rate: jax.Array
    targets: jax.Array


def make_train_step(
    graph: nnx.GraphDef,
    mask: PyTree,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    accumulation: int,
    contrast: float = 0.0,
) -> Callable[[TrainState, PyTree, Batch], tuple[TrainState, Metrics]]:
    """(state, frozen, batch) -> (state, metrics).

    The loss is the mean over the batch's targets, whatever micro-batch they fall in: `accumulation` micro-batches
    give the gradient of one large batch. `contrast` times `confusion` is added to what is differentiated, not to what
    is reported.
    """

    def objective(trainable: PyTree, frozen: PyTree, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, join(trainable, frozen, mask))
        nll = model.target_nll(batch, key)
        total = jnp.sum(nll)
        return total + contrast * confusion(model, batch, nll, key) if contrast else total, total

    def train_step(state: TrainState, frozen: PyTree, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        targets = jnp.maximum(jnp.sum(batch["target_weights"]), 1.0)
        gradient = jax.value_and_grad(objective, has_aux=True)
        if accumulation == 1:
            (_, nll), grads = gradient(state.trainable, frozen, batch, key)
        else:
            # Strided micro-batches: each keeps a share of every device's rows.
            micro = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulation, *x.shape[1:]), 1, 0), batch)

            def add(total: PyTree, inputs: tuple[jax.Array, Batch]) -> tuple[PyTree, None]:
                index, rows = inputs
                (_, nll), grads = gradient(state.trainable, frozen, rows, jax.random.fold_in(key, index))
                return jax.tree.map(jnp.add, total, (nll, grads)), None

            zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.trainable)
            (nll, grads), _ = jax.lax.scan(add, zero, (jnp.arange(accumulation), micro))
        grads = jax.tree.map(lambda g: g / targets.astype(g.dtype), grads)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies its integer counts by floats
            updates, opt_state = optimizer.update(grads, state.optimizer, state.trainable)
            learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = Metrics(nll / targets, optax.tree.norm(grads), learning_rate, targets)
        return TrainState(state.step + 1, trainable, opt_state, state.key), metrics

    return train_step


def make_eval_step(graph: nnx.GraphDef, mask: PyTree) -> Callable[[PyTree, PyTree, Batch], jax.Array]:
    """(trainable, frozen, batch) -> [B, S] float32: summed nats over each segment's targets."""

    def eval_step(trainable: PyTree, frozen: PyTree, batch: Batch) -> jax.Array:
        model = nnx.merge(graph, join(trainable, frozen, mask))
        return by_segment(model.target_nll(batch), batch)

    return eval_step


def by_segment(values: jax.Array, batch: Batch) -> jax.Array:
    """[B, M] per target -> [B, S], summed over each segment's."""
    segment = jnp.take_along_axis(batch["segment_ids"], batch["target_positions"], axis=1) - 1
    members = segment[:, :, None] == jnp.arange(batch["user_embeddings"].shape[1])[None, None]
    return jnp.einsum("bm,bms->bs", values, members.astype(values.dtype))


def confusion(model: PrefixModel, batch: Batch, nll: jax.Array, key: jax.Array) -> jax.Array:
    """Sum over segments of -log P(the segment's user, rather than the batch's next one | what was said).

    With both users as likely beforehand that is softplus of the log-likelihood ratio of the other to the own vector.

    Args:
      nll: [B, M] with the own vectors.
      key: of the dropout that gave `nll`; the other vectors get the same.
    """
    other = batch | {"user_embeddings": next_users(batch)}
    ratio = by_segment(nll - model.target_nll(other, key), batch)
    return jnp.sum(jnp.where(_occupied(batch), jax.nn.softplus(ratio), 0.0))


def _occupied(batch: Batch) -> jax.Array:
    """[B, S] bool: there is such a segment."""
    segments = jnp.arange(batch["user_embeddings"].shape[1]) + 1
    return jnp.max(batch["segment_ids"], axis=1, keepdims=True) >= segments[None]


def next_users(batch: Batch) -> jax.Array:
    """[B, S, E]: every segment gets the vector of the next one, the last of the batch that of the first."""
    vectors, occupied = batch["user_embeddings"], _occupied(batch).reshape(-1)
    flat = vectors.reshape(len(occupied), -1)
    order = jnp.argsort(~occupied, stable=True)  # the occupied ones, in order, then the others
    place = jnp.arange(len(order))
    count = jnp.maximum(jnp.sum(occupied), 1)
    following = order[jnp.where(place < count, (place + 1) % count, place)]
    return jnp.zeros_like(flat).at[order].set(flat[following]).reshape(vectors.shape)
