"""The train step: what moves, what it costs, and that meshes and micro-batches change nothing."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import SIZES, assert_close, mesh_of, prefix_model, random_batch
from jax.sharding import Mesh

from e2p_jax.backbone.layout import Execution
from e2p_jax.config import TrainConfig
from e2p_jax.parallel.mesh import param_sharding, row_sharding
from e2p_jax.prefix.model import Batch, PrefixModel
from e2p_jax.train.optimizer import make_optimizer
from e2p_jax.train.partition import path_name, split, trainable_mask
from e2p_jax.train.setup import Model, initial_state
from e2p_jax.train.step import Metrics, TrainState, make_eval_step, make_train_step

EVERYTHING = ("projector/**", "backbone/**")
ROWS, LENGTH, TARGETS, VOCABULARY = 8, 128, 48, SIZES["vocab_size"]


class Setting(NamedTuple):
    model: Model
    state: TrainState
    frozen: Any
    step: Any  # (state, frozen, batch) -> (state, metrics), compiled when it is first called


@functools.cache
def prepare(
    *,
    mesh: Mesh | None = None,
    trainable: tuple[str, ...] = ("projector/**",),
    accumulation: int = 1,
    dropout: float = 0.0,
    **fields: Any,
) -> Setting:
    """State and step as `train` builds them, around random weights and AdamW without a warm-up."""
    mesh = mesh or mesh_of()
    config = TrainConfig(**{"warmup_steps": 0, "learning_rate": 1e-2, "steps": 10, **fields})
    whole = prefix_model(num_hidden_layers=2, execution=Execution(remat=True), dropout=dropout)
    graph, state = nnx.split(whole)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.device_put(x, param_sharding(mesh, path_name(path), x.shape)), nnx.to_pure_dict(state)
    )
    model = Model(mesh, graph, params, trainable_mask(whole, trainable), "random")
    optimizer = make_optimizer(config, model.mask, params)
    step = make_train_step(graph, model.mask, optimizer, optax.constant_schedule(1e-2), accumulation)
    return Setting(model, *initial_state(model, config), jax.jit(step))


def run(setting: Setting, batches: list[Batch]) -> tuple[TrainState, list[Metrics]]:
    state, log = setting.state, []
    with jax.set_mesh(setting.model.mesh):
        for batch in batches:
            state, metrics = setting.step(
                state, setting.frozen, jax.device_put(batch, row_sharding(setting.model.mesh))
            )
            log.append(metrics)
    return state, log


def leaves(tree: Any) -> dict[str, np.ndarray]:
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def batches(count: int) -> list[Batch]:
    return [random_batch(seed, rows=ROWS, length=LENGTH, targets=TARGETS) for seed in range(count)]


def test_only_the_trainable_part_moves() -> None:
    setting = prepare()
    before, frozen = leaves(setting.state.trainable), leaves(setting.frozen)
    state, log = run(setting, [*batches(1)] * 4)
    after = leaves(state.trainable)
    assert all((after[name] != value).all() for name, value in before.items())
    for name, value in leaves(setting.frozen).items():
        np.testing.assert_array_equal(value, frozen[name])
    assert int(state.step) == 4
    assert float(log[-1].loss) < float(log[0].loss) - 0.1  # and it learns its batch


def test_loss_and_gradient_norm_are_those_of_the_projector_alone() -> None:
    """Against `jax.grad` of the module with the projector's parameters as its only argument."""
    setting, (batch,) = prepare(), batches(1)
    parameters = nnx.All(nnx.PathContains("projector"), nnx.Param)
    graph, projector, rest = nnx.split(prefix_model(num_hidden_layers=2), parameters, ...)

    def mean_nll(projector: Any) -> jax.Array:
        return jnp.sum(nnx.merge(graph, projector, rest).target_nll(batch)) / np.sum(batch["target_weights"])

    loss, grads = jax.jit(jax.value_and_grad(mean_nll))(projector)
    _, (metrics,) = run(setting, [batch])
    assert float(metrics.loss) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics.grad_norm) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-4)
    assert float(metrics.targets) == np.sum(batch["target_weights"])
    assert float(metrics.learning_rate) == pytest.approx(1e-2)


def test_the_clip_reads_the_trainable_gradient_only() -> None:
    """Adam's first moment after one step is a tenth of the clipped gradient, whose norm is then the clip itself."""
    norm = float(run(prepare(), batches(1))[1][0].grad_norm)
    for clip, expected in [(norm / 7, norm / 7), (norm * 1.01, norm)]:
        state, _ = run(prepare(clip_norm=clip), batches(1))
        (adam,) = [s for s in jax.tree.leaves(state.optimizer, is_leaf=_is_adam) if _is_adam(s)]
        assert float(optax.tree.norm(adam.mu)) == pytest.approx(0.1 * expected, rel=1e-3)


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


@pytest.mark.parametrize("axes", [{}, {"data": 2, "fsdp": 2}], ids=str)
def test_micro_batches_give_the_gradient_of_the_whole(axes: dict[str, int]) -> None:
    """Rows hold different numbers of targets, so a mean of means would differ."""
    batch = batches(1)[0]
    batch["target_weights"][2:4] = 0.0
    mesh = mesh_of(**axes)
    one, (metrics,) = run(prepare(mesh=mesh), [batch])
    many, (other,) = run(prepare(mesh=mesh, accumulation=4 if mesh.size == 1 else 2), [batch])
    assert float(other.loss) == pytest.approx(float(metrics.loss), rel=1e-6)
    assert float(other.grad_norm) == pytest.approx(float(metrics.grad_norm), rel=1e-5)
    assert_close_trees(moments(many), moments(one), 1e-5)


def moments(state: TrainState) -> dict[str, np.ndarray]:
    """Adam's moments: the gradient without the division that blows up its smallest entries."""
    return {name: value for name, value in leaves(state.optimizer).items() if value.ndim}


def assert_close_trees(a: dict[str, np.ndarray], b: dict[str, np.ndarray], tolerance: float) -> None:
    assert a.keys() == b.keys() != set()
    for name in a:
        assert_close(a[name], b[name], tolerance)


@functools.cache
def on_one_device(trainable: tuple[str, ...]) -> tuple[TrainState, list[Metrics]]:
    return run(prepare(trainable=trainable), batches(2))


@pytest.mark.parametrize(
    ("axes", "trainable"),
    [
        ({"data": 2, "tensor": 2}, ("projector/**",)),
        ({"fsdp": 4}, ("projector/**",)),
        ({"fsdp": 2, "tensor": 2}, EVERYTHING),
    ],
    ids=str,
)
def test_a_mesh_changes_nothing(axes: dict[str, int], trainable: tuple[str, ...]) -> None:
    one, log_one = on_one_device(trainable)
    many, log_many = run(prepare(mesh=mesh_of(**axes), trainable=trainable), batches(2))
    for a, b in zip(log_many, log_one, strict=True):
        assert float(a.loss) == pytest.approx(float(b.loss), rel=1e-5)
        assert float(a.grad_norm) == pytest.approx(float(b.grad_norm), rel=1e-4)
    assert_close_trees(moments(many), moments(one), 2e-4)
    assert_close_trees(leaves(many.trainable), leaves(one.trainable), 1e-4)


def test_dropout_is_new_every_step_and_repeats_from_the_same_state() -> None:
    def losses(seed: int) -> list[float]:
        return [float(m.loss) for m in run(prepare(dropout=0.5, seed=seed, learning_rate=0.0), batches(1) * 3)[1]]

    assert losses(0) == losses(0)
    assert len({*losses(0), *losses(1)}) == 6


def compiled(setting: Setting) -> Any:
    with jax.set_mesh(setting.model.mesh):
        placed = jax.device_put(batches(1)[0], row_sharding(setting.model.mesh))
        return setting.step.lower(setting.state, setting.frozen, placed).compile()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_logits_of_all_positions(accumulation: int) -> None:
    """No array of the compiled step with a vocabulary axis is larger than the targets' logits."""
    text = compiled(prepare(accumulation=accumulation)).as_text()
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"[a-z]+\d*\[(\d+(?:,\d+)*)\]", text)}
    with_vocabulary = {shape: int(np.prod(shape)) for shape in shapes if VOCABULARY in shape}
    rows = ROWS // accumulation
    assert (rows, TARGETS, VOCABULARY) in with_vocabulary or (rows * TARGETS, VOCABULARY) in with_vocabulary
    assert max(with_vocabulary.values()) == rows * TARGETS * VOCABULARY
    assert any(np.prod(shape) >= rows * LENGTH * SIZES["hidden_size"] for shape in shapes)  # the search sees T


def test_the_step_returns_nothing_of_the_backbone() -> None:
    setting = prepare()
    state, metrics = jax.eval_shape(setting.step, setting.state, setting.frozen, batches(1)[0])
    trained = sum(leaf.size for leaf in jax.tree.leaves(setting.state.trainable))
    returned = sum(leaf.size for leaf in jax.tree.leaves((state, metrics)))
    assert returned <= 3 * trained + 10  # parameters, two moments, counters, key, metrics
    nbytes = compiled(setting).memory_analysis().output_size_in_bytes
    assert nbytes < 4 * (3 * trained + 10) + 1024  # and a table of pointers


def test_frozen_weights_have_no_gradient_in_the_step() -> None:
    """Per layer the backward pass makes no product with the shape of a weight; with everything trained it does."""
    q_shape = f"f32[{SIZES['num_attention_heads'] * SIZES['head_dim']},{SIZES['hidden_size']}]"
    dots = re.compile(re.escape(q_shape) + r"\{[\d,]*\} dot\(")
    frozen, trained = (compiled(prepare(trainable=t)).as_text() for t in (("projector/**",), EVERYTHING))
    assert not dots.search(frozen)
    assert dots.search(trained)


def test_eval_step_sums_by_segment() -> None:
    setting, (batch,) = prepare(), batches(1)
    model: PrefixModel = nnx.merge(setting.model.graph, setting.model.params)
    nll = np.asarray(model.target_nll(batch))
    trainable, frozen = split(setting.model.params, setting.model.mask)
    sums = np.asarray(jax.jit(make_eval_step(setting.model.graph, setting.model.mask))(trainable, frozen, batch))
    expected = np.zeros((ROWS, 3), np.float32)
    for row, target in np.argwhere(batch["target_weights"] > 0):
        place = batch["target_positions"][row, target]
        expected[row, batch["segment_ids"][row, place] - 1] += nll[row, target]
    assert (expected > 1).all()
    np.testing.assert_allclose(sums, expected, rtol=1e-5)
