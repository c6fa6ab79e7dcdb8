"""Pure train and evaluation steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from e2p_jax.prefix.model import Batch
from e2p_jax.products import einsum
from e2p_jax.train.partition import join

PyTree = Any


class TrainState(NamedTuple):
    """The state that a step changes, and a checkpoint keeps."""

    step: jax.Array  # [] int32, steps done
    trainable: PyTree
    optimizer: optax.OptState
    key: jax.Array  # typed PRNG key; each step folds its number in


class Metrics(NamedTuple):
    """Scalars of one step, float32."""

    loss: jax.Array  # nats per target
    grad_norm: jax.Array  # of the trainable part, before the clip
    learning_rate: jax.Array
    targets: jax.Array
    parameter_norm: jax.Array  # of the trainable part, after the step: finite where every parameter is


def make_train_step(
    graph: nnx.GraphDef,
    mask: PyTree,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    accumulation: int,
) -> Callable[[TrainState, PyTree, Batch], tuple[TrainState, Metrics]]:
    """(state, frozen, batch) -> (state, metrics).

    The loss is the mean over the batch's targets, whatever micro-batch they fall in: `accumulation` micro-batches
    give the gradient of one large batch. With a catalogue it is the mean over the conversations that name items, and
    that over targets by its weight.
    """

    def summed_nll(trainable: PyTree, frozen: PyTree, batch: Batch, key: jax.Array, share: jax.Array) -> jax.Array:
        """Of a conversation's items as of `share` targets, so that divided by the targets it is both means."""
        model = nnx.merge(graph, join(trainable, frozen, mask))
        text, items = model.losses(batch, key)
        if items is None:
            return jnp.sum(text)
        summed = share * jnp.sum(items)
        return summed if text is None else summed + model.items.settings.text_weight * jnp.sum(text)

    def train_step(state: TrainState, frozen: PyTree, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        targets = jnp.maximum(jnp.sum(batch["target_weights"]), 1.0)
        share = targets / jnp.maximum(_naming(batch), 1.0)
        gradient = jax.value_and_grad(summed_nll)
        if accumulation == 1:
            nll, grads = gradient(state.trainable, frozen, batch, key, share)
        else:
            # Strided micro-batches: each keeps a share of every device's rows.
            micro = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulation, *x.shape[1:]), 1, 0), batch)

            def add(total: PyTree, inputs: tuple[jax.Array, Batch]) -> tuple[PyTree, None]:
                index, rows = inputs
                part = gradient(state.trainable, frozen, rows, jax.random.fold_in(key, index), share)
                return jax.tree.map(jnp.add, total, part), None

            zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.trainable)
            (nll, grads), _ = jax.lax.scan(add, zero, (jnp.arange(accumulation), micro))
        grads = jax.tree.map(lambda g: g / targets.astype(g.dtype), grads)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies its integer counts by floats
            updates, opt_state = optimizer.update(grads, state.optimizer, state.trainable)
            learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
        trainable = optax.apply_updates(state.trainable, updates)
        size = optax.tree.norm(trainable).astype(jnp.float32)
        metrics = Metrics(nll / targets, optax.tree.norm(grads), learning_rate, targets, size)
        return TrainState(state.step + 1, trainable, opt_state, state.key), metrics

    return train_step


def _naming(batch: Batch) -> jax.Array:
    """[] float32: conversations that name items."""
    ids = batch.get("item_ids")
    return jnp.ones(()) if ids is None else jnp.sum((ids >= 0).any(axis=-1), dtype=jnp.float32)


def make_item_step(graph: nnx.GraphDef, mask: PyTree, what: str) -> Callable[[PyTree, PyTree, Batch], jax.Array]:
    """(trainable, frozen, batch) -> [B, S, ...], what a `PrefixModel` calls `item_nll` or `item_queries`."""

    def item_step(trainable: PyTree, frozen: PyTree, batch: Batch) -> jax.Array:
        out: jax.Array = getattr(nnx.merge(graph, join(trainable, frozen, mask)), what)(batch)
        return out

    return item_step


def make_eval_step(graph: nnx.GraphDef, mask: PyTree) -> Callable[[PyTree, PyTree, Batch], jax.Array]:
    """(trainable, frozen, batch) -> [B, S] float32: summed nats over each segment's targets."""

    def eval_step(trainable: PyTree, frozen: PyTree, batch: Batch) -> jax.Array:
        model = nnx.merge(graph, join(trainable, frozen, mask))
        nll = model.target_nll(batch)  # [B, M]
        segment = jnp.take_along_axis(batch["segment_ids"], batch["target_positions"], axis=1) - 1
        members = segment[:, :, None] == jnp.arange(batch["user_embeddings"].shape[1])[None, None]
        return einsum("bm,bms->bs", nll, members.astype(nll.dtype))

    return eval_step
