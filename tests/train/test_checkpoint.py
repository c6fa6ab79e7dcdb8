"""Checkpoints: bit for bit, whatever mesh they are read onto; which are kept, and what damage does."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from e2p_jax.config import MeshConfig, TrainConfig
from e2p_jax.errors import UserError
from e2p_jax.parallel.mesh import make_mesh
from e2p_jax.train.checkpoint import Checkpoints
from e2p_jax.train.manifest import find_damage, write_manifest
from e2p_jax.train.optimizer import make_optimizer
from e2p_jax.train.partition import split
from e2p_jax.train.step import TrainState

MASK = {"backbone": {"embedding": False, "layers": {"q": True}}, "projector": {"skip": True, "input_mean": False}}
KEEP = TrainConfig(keep_last=1)
DATA = {"next_index": 7, "nested": {"epoch": 1}}


def params(width: int = 8) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"embedding": (16, width), "q": (2, width, width), "skip": (4, width), "input_mean": (4,)}
    leaves = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    leaves["q"] = leaves["q"].astype(jnp.bfloat16)
    return {
        "backbone": {"embedding": leaves["embedding"], "layers": {"q": leaves["q"]}},
        "projector": {"skip": leaves["skip"], "input_mean": leaves["input_mean"]},
    }


def sharded(state: TrainState, **axes: int) -> TrainState:
    """Matrices over every axis of the mesh that divides them, the rest whole."""
    mesh = make_mesh(MeshConfig(**axes))

    def place(leaf: jax.Array) -> jax.Array:
        spec = P(*[None] * (leaf.ndim - 2), "fsdp", "tensor") if leaf.ndim >= 2 else P()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(place, state)


def make_state(step: int = 0, width: int = 8, blank: bool = False) -> tuple[TrainState, Any]:
    """A state after one update, so that no moment is zero; or one to be restored over."""
    trainable, frozen = split(params(width), MASK)
    optimizer = make_optimizer(TrainConfig(), MASK, params(width))
    opt_state = optimizer.init(trainable)
    if not blank:
        grads = jax.tree.map(lambda p: jnp.sin(p * 3), trainable)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    key = jax.random.fold_in(jax.random.key(5), 0 if blank else 9)
    return TrainState(jnp.asarray(step, jnp.int32), trainable, opt_state, key), frozen["projector"]


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpoints]:
    checkpoints = Checkpoints(tmp_path, KEEP)
    yield checkpoints
    checkpoints.close()


def assert_same_bits(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype, path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@pytest.mark.parametrize(
    ("saved_on", "read_onto"),
    [({}, {}), ({"fsdp": 4}, {"fsdp": 1}), ({"fsdp": 2, "tensor": 2}, {"tensor": 4}), ({"data": 4}, {"fsdp": 4})],
    ids=str,
)
def test_restored_bit_for_bit_onto_another_mesh(tmp_path: Path, saved_on: dict, read_onto: dict) -> None:
    state, statistics = make_state(12)
    state = sharded(state, **saved_on)
    writer = Checkpoints(tmp_path, KEEP)
    writer.save(state, statistics, DATA, 1.5)
    writer.close()

    blank, other = make_state(blank=True)
    blank, other = sharded(blank, **read_onto), jax.tree.map(jnp.zeros_like, other)
    reader = Checkpoints(tmp_path)
    assert reader.latest_step == 12
    restored, restored_statistics, data = reader.restore(12, blank, other)
    reader.close()
    assert_same_bits(restored, state)
    assert_same_bits(restored_statistics, statistics)
    assert data == DATA
    for leaf, want in zip(jax.tree.leaves(restored), jax.tree.leaves(blank), strict=True):
        assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)
    assert jax.random.uniform(restored.key) == jax.random.uniform(state.key)


def steps_on_disk(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("nlls", "kept", "best"),
    [
        ([3.0, 1.0, None, 2.0], [2, 4], 2),
        ([3.0, 2.0, 1.0], [3], 3),
        ([1.0, 2.0, 3.0, None], [1, 4], 1),
        ([None, None], [2], 2),
    ],
)
def test_the_last_and_the_best_are_kept(
    tmp_path: Path, checkpoints: Checkpoints, nlls: list[float | None], kept: list[int], best: int
) -> None:
    for number, nll in enumerate(nlls, 1):
        state, statistics = make_state(number)
        checkpoints.save(state, statistics, DATA, nll)
    checkpoints.wait()
    assert steps_on_disk(tmp_path) == kept
    again = Checkpoints(tmp_path)
    assert (again.step_of("best"), again.step_of("last"), again.latest_step) == (best, len(nlls), len(nlls))
    assert [again.step_of(str(step)) for step in kept] == kept
    again.close()


def test_an_nll_that_is_not_finite_is_never_best(tmp_path: Path) -> None:
    """Earlier versions kept such numbers; they are as if there were none."""
    keep = TrainConfig(keep_last=2)
    save_steps(tmp_path, [3.0, 1.0, 2.0, 4.0], keep)
    assert steps_on_disk(tmp_path) == [2, 3, 4]
    record_as_nan(tmp_path, [3, 4])
    reader = Checkpoints(tmp_path)
    assert reader.step_of("best") == 2
    reader.close()
    writer = Checkpoints(tmp_path, keep)
    for nll in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="ranks nothing"):
            writer.save(*make_state(5), DATA, nll)
    writer.save(*make_state(5), DATA, 5.0)
    writer.close()
    assert steps_on_disk(tmp_path) == [2, 4, 5]
    record_as_nan(tmp_path, [2, 5])
    reader = Checkpoints(tmp_path)
    assert reader.step_of("best") == 5  # the last: none is known to be better
    reader.close()


def record_as_nan(run: Path, steps: list[int]) -> None:
    for step in steps:
        place = run / "checkpoints" / str(step)
        metrics = place / "metrics" / "metrics"
        assert "nll" in json.loads(metrics.read_text())
        metrics.write_text('{"nll": NaN}')
        write_manifest(epath.Path(place))


def test_parameters_that_are_not_finite_are_not_restored(tmp_path: Path) -> None:
    state, statistics = make_state(1)
    state = state._replace(trainable=jax.tree.map(lambda p: p.at[0].set(jnp.nan), state.trainable))
    checkpoints = Checkpoints(tmp_path, KEEP)
    checkpoints.save(state, statistics, DATA, None)
    checkpoints.wait()
    with pytest.raises(UserError, match=r"checkpoints/1: holds parameters that are not finite .*; move it away"):
        checkpoints.restore(1, *make_state(blank=True))
    checkpoints.close()


def test_best_is_remembered_over_a_restart(tmp_path: Path) -> None:
    for number, nll in enumerate([1.0, 2.0, 3.0], 1):
        checkpoints = Checkpoints(tmp_path, KEEP)
        state, statistics = make_state(number)
        checkpoints.save(state, statistics, DATA, nll)
        checkpoints.close()
    assert steps_on_disk(tmp_path) == [1, 3]


def test_frozen_parameters_are_not_written(tmp_path: Path, checkpoints: Checkpoints) -> None:
    state, statistics = make_state(1)
    checkpoints.save(state, statistics, DATA, None)
    checkpoints.wait()
    written = (tmp_path / "checkpoints" / "1" / "state" / "_METADATA").read_text()
    assert "backbone/layers/q" in written and "projector/skip" in written
    assert "backbone/embedding" not in written and "input_mean" not in written


def test_unknown_checkpoint_is_refused(checkpoints: Checkpoints) -> None:
    assert checkpoints.latest_step is None
    with pytest.raises(UserError, match="no checkpoint yet; run `e2p train` first"):
        checkpoints.step_of("best")
    state, statistics = make_state(3)
    checkpoints.save(state, statistics, DATA, None)
    checkpoints.wait()
    for which in ("4", "newest"):
        with pytest.raises(UserError, match=rf"--checkpoint {which}: .*checkpoints has best, last and \[3\]"):
            checkpoints.step_of(which)


def test_checkpoint_of_another_config_is_refused(checkpoints: Checkpoints) -> None:
    state, statistics = make_state(1)
    checkpoints.save(state, statistics, DATA, None)
    checkpoints.wait()
    wider, _ = make_state(width=12, blank=True)
    more = state._replace(trainable={**state.trainable, "lora": jnp.zeros((2, 2))})
    less = state._replace(trainable={"projector": state.trainable["projector"]})
    for other, difference in (
        (wider, r"optimizer/.*/backbone/layers/q has shape \(2, 8, 8\) there, \(2, 12, 12\) here"),
        (more, r"trainable/lora has shape None there, \(2, 2\) here"),
        (less, r"trainable/backbone/layers/q has shape \(2, 8, 8\) there, None here"),
    ):
        with pytest.raises(UserError, match=rf"checkpoints/1: does not fit this run's config: {difference}") as caught:
            checkpoints.restore(1, other, statistics)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"input_mean has shape \(4,\) there, \(5,\) here"):
        checkpoints.restore(1, state, {**statistics, "input_mean": jnp.zeros(5)})


def save_steps(run: Path, nlls: list[float | None], keep: TrainConfig) -> None:
    checkpoints = Checkpoints(run, keep)
    for number, nll in enumerate(nlls, 1):
        state, statistics = make_state(number)
        checkpoints.save(state, statistics, DATA, nll)
    checkpoints.close()


@pytest.mark.parametrize(
    ("last", "best", "kept"), [(1, 1, [2, 6]), (3, 1, [2, 4, 5, 6]), (1, 2, [2, 3, 6]), (2, 3, [1, 2, 3, 5, 6])]
)
def test_as_many_are_kept_as_the_config_says(tmp_path: Path, last: int, best: int, kept: list[int]) -> None:
    save_steps(tmp_path, [3.0, 1.0, 2.0, 5.0, 4.0, None], TrainConfig(keep_last=last, keep_best=best))
    assert steps_on_disk(tmp_path) == kept


def largest_file(step: Path) -> Path:
    """Of the state's arrays."""
    return max((step / "state").glob("**/d/*"), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped": (flip, "differs from what was written"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "differs from what was written"),
    "missing": (Path.unlink, "is missing"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path, kind: str) -> None:
    save_steps(tmp_path, [1.0, 2.0, 3.0], TrainConfig(keep_last=2))
    broken = largest_file(tmp_path / "checkpoints" / "3")
    damage, words = DAMAGES[kind]
    damage(broken)
    said = rf"checkpoints/3: {broken.relative_to(tmp_path / 'checkpoints' / '3')} {words}"

    reader = Checkpoints(tmp_path)
    with pytest.raises(UserError, match=rf"{said}; choose another with --checkpoint: \[1, 2\]"):
        reader.check(reader.step_of("last"))
    reader.check(2)
    reader.close()

    writer = Checkpoints(tmp_path, TrainConfig(keep_last=2))
    (message,) = writer.damaged
    assert re.search(f"{said}; moved to .*damaged/3", message) and (tmp_path / "damaged" / "3" / "state").is_dir()
    assert writer.latest_step == 2
    blank, other = make_state(blank=True)
    restored, *_ = writer.restore(2, blank, other)
    assert_same_bits(restored, make_state(2)[0])
    writer.save(*make_state(3), DATA, None)  # the step can be written again
    writer.close()
    assert Checkpoints(tmp_path, TrainConfig()).damaged == []
    assert steps_on_disk(tmp_path) == [1, 2, 3]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("three")
    save_steps(run, [2.0, 1.0, 3.0], TrainConfig(keep_last=3))
    return run


def unsigned(change: Callable[[Path], object]) -> Callable[[Path], object]:
    """The same to a checkpoint of before there were sums."""
    return lambda place: ((place / "sha256.json").unlink(), change(place))


def replaced(name: str, text: str) -> Callable[[Path], object]:
    return lambda place: (place / name).write_text(text)


ALTERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "renamed file": (lambda p: largest_file(p).rename(p / "state" / "d" / "0"), "is missing"),
    "edited metrics": (replaced("metrics/metrics", '{"nll": 0.1}'), "metrics/metrics differs from what was written"),
    "torn metrics": (unsigned(replaced("metrics/metrics", "{")), "metrics/metrics is damaged"),
    "no sums": (replaced("sha256.json", "{}"), "sha256.json is damaged"),
    "a list of sums": (replaced("sha256.json", "[]"), "sha256.json is damaged"),
    "the sum of a folder": (replaced("sha256.json", '{"state": "0"}'), "state is missing"),
    "torn metadata": (unsigned(replaced("state/_METADATA", "{")), "state/_METADATA is damaged"),
    "a position in a list": (unsigned(replaced("data/metadata", "[]")), "data/metadata is damaged"),
    "no state": (unsigned(lambda p: shutil.rmtree(p / "state")), "state is missing"),
    "nothing": (lambda p: (shutil.rmtree(p), p.mkdir()), "state is missing"),
}


@pytest.mark.parametrize("kind", ALTERED)
def test_an_altered_checkpoint_is_named_and_the_one_before_is_used(three: Path, tmp_path: Path, kind: str) -> None:
    change, words = ALTERED[kind]
    run = shutil.copytree(three, tmp_path / "run")
    change(run / "checkpoints" / "3")
    with pytest.raises(UserError, match=rf"checkpoints(: cannot be read \(3|/3): .*{words}"):
        reader = Checkpoints(run)
        reader.step_of("best")
        reader.check(reader.step_of("last"))
    writer = Checkpoints(run, TrainConfig(keep_last=3))
    assert len(writer.damaged) == 1 and re.search(words, writer.damaged[0])
    assert (writer.step_of("last"), writer.step_of("best")) == (2, 2)
    assert_same_bits(writer.restore(2, *make_state(blank=True))[0], make_state(2)[0])
    writer.close()


UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped without sums": (unsigned(lambda p: flip(largest_file(p))), r"cannot be read \(ValueError: DATA_LOSS"),
    "missing without sums": (unsigned(lambda p: largest_file(p).unlink()), r"cannot be read \(ValueError: NOT_FOUND"),
    "a list of metadata": (replaced("_CHECKPOINT_METADATA", "[]"), r"cannot be read \(ValueError: Metadata dict must"),
    "another's name": (
        lambda p: shutil.copytree(p, p.with_name("7")),
        "checkpoints/7: holds step 3; give it that name",
    ),
}


# Of a read that failed, tensorstore's threads still report to an event loop that Orbax has closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_restored_is_one_line(three: Path, tmp_path: Path, kind: str) -> None:
    change, words = UNREADABLE[kind]
    run = shutil.copytree(three, tmp_path / "run")
    change(run / "checkpoints" / "3")
    for settings in (None, TrainConfig(keep_last=3)):
        with pytest.raises(UserError, match=rf"{tmp_path}.*{words}") as caught:
            checkpoints = Checkpoints(run, settings)
            checkpoints.restore(checkpoints.step_of("last"), *make_state(blank=True))
        assert "\n" not in str(caught.value)


def test_a_second_damage_of_the_same_step_takes_the_place_of_the_first(tmp_path: Path) -> None:
    for _ in range(2):
        save_steps(tmp_path, [1.0, 2.0], TrainConfig())
        flip(largest_file(tmp_path / "checkpoints" / "2"))
        Checkpoints(tmp_path, TrainConfig()).close()
        shutil.rmtree(tmp_path / "checkpoints")
    assert [path.name for path in (tmp_path / "damaged").iterdir()] == ["2"]


def test_nothing_is_restored_where_every_checkpoint_is_damaged(tmp_path: Path) -> None:
    save_steps(tmp_path, [1.0, 2.0], TrainConfig())
    flip(largest_file(tmp_path / "checkpoints" / "1"))
    (tmp_path / "checkpoints" / "2" / "sha256.json").write_text("{")
    with pytest.raises(UserError, match=r"every checkpoint is damaged \(1: .* differs.*; 2: sha256.json is damaged\)"):
        Checkpoints(tmp_path, TrainConfig())
    assert steps_on_disk(tmp_path) == [1, 2]


def test_a_checkpoint_of_before_there_were_sums_is_taken_as_it_is(tmp_path: Path) -> None:
    save_steps(tmp_path, [1.0], TrainConfig())
    (tmp_path / "checkpoints" / "1" / "sha256.json").unlink()
    checkpoints = Checkpoints(tmp_path, TrainConfig())
    checkpoints.check(1)
    assert checkpoints.latest_step == 1 and checkpoints.damaged == []
    checkpoints.close()


def test_what_a_crash_left_half_written_is_removed_by_the_next_writer_alone(tmp_path: Path) -> None:
    save_steps(tmp_path, [1.0], TrainConfig())
    left = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "1", left)
    reader = Checkpoints(tmp_path)  # may read while the run writes
    assert reader.latest_step == 1 and left.exists()
    reader.close()
    save_steps(tmp_path, [None, None], TrainConfig())  # step 1 is there, and stays as it is
    assert not left.exists() and steps_on_disk(tmp_path) == [1, 2]


def test_a_step_that_is_no_longer_kept_goes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while its files are deleted leaves no step in part; the next writer deletes the rest."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed before it began
        save_steps(tmp_path, [2.0, 1.0, 3.0], KEEP)
    removed = tmp_path / "checkpoints" / ".removed" / "1"
    assert find_damage(epath.Path(removed)) is None and (removed / "sha256.json").is_file()
    (removed / "sha256.json").unlink()
    reader = Checkpoints(tmp_path)
    assert reader.step_of("best") == 2 and removed.exists()
    reader.close()
    writer = Checkpoints(tmp_path, KEEP)
    assert writer.damaged == [] and steps_on_disk(tmp_path) == [2, 3] and not (tmp_path / "damaged").exists()
    writer.close()
