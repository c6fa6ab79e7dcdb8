"""Measures what is left of a prefix when the vector behind it is not what it was in training."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from e2p_jax.config import Condition
from e2p_jax.data.pipeline import PackedDataset
from e2p_jax.datasets.records import Record
from e2p_jax.evaluate.measures import interval
from e2p_jax.train.run import Run
from e2p_jax.train.score import Scorer, pack_groups
from e2p_jax.vectors.source import Vectors

Disturbance = Callable[[np.ndarray, np.ndarray, float, np.random.Generator], np.ndarray]


def noise(own: np.ndarray, other: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
    """Adds normal noise of standard deviation `level`, in units of the training users' spread."""
    return own + level * rng.normal(size=own.shape)


def rotation(own: np.ndarray, other: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
    """Turns the space by `level` degrees, which is then the angle between every vector and its image; with an odd width
    one direction stays.
    """
    width = own.shape[1]
    basis, _ = np.linalg.qr(rng.normal(size=(width, width)))
    pairs = width // 2
    first, second = basis[:, :pairs], basis[:, pairs : 2 * pairs]
    turn, angle = second @ first.T - first @ second.T, np.deg2rad(level)
    still = own @ basis[:, 2 * pairs :] @ basis[:, 2 * pairs :].T
    return np.cos(angle) * (own - still) + np.sin(angle) * own @ turn.T + still


def dimensions(own: np.ndarray, other: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
    """A share `level` of each vector's dimensions is lost: they are the training users' mean."""
    return np.where(rng.random(own.shape) < level, 0.0, own)


def staleness(own: np.ndarray, other: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
    """The vector is a share `level` of what the user no longer is: another user's vector."""
    return (1 - level) * own + level * other


DISTURBANCES: dict[str, tuple[str, Disturbance, tuple[float, ...]]] = {
    "noise": ("standard deviations of noise", noise, (0.25, 0.5, 1.0, 2.0)),
    "rotation": ("degrees of rotation", rotation, (15.0, 30.0, 60.0, 90.0)),
    "dimensions": ("share of dimensions lost", dimensions, (0.1, 0.25, 0.5, 0.75)),
    "staleness": ("share of another user's vector", staleness, (0.25, 0.5, 0.75, 1.0)),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """NLL per target at one level of one disturbance, with its 95 % interval."""

    disturbance: str
    level: float
    nll: float
    low: float
    high: float


def robustness(run: Run, records: Sequence[Record]) -> list[Point]:
    """Curves of the NLL over every disturbance, level 0 among them, in standardised space; all with one compiled step.

    Also one point each of `cold start`: the null user where the run has one, else the training users' mean; and of
    `none`, without a prefix.

    Args:
      run: trained on users' vectors.
      records: to score.

    Raises:
      UserError: a user without a vector, or a record that cannot fit.
    """
    encoder, population = run.inputs.encoder, run.population
    fitted = [encoder.fit(record, ["e2p", "none"]) for record in records]
    kept = [fit.record for fit in fitted]
    examples = [fit.examples["e2p"] for fit in fitted]
    targets = np.array([int(example.is_target.sum()) for example in examples])
    users = [record.user_id for record in kept]
    conditions: tuple[Condition, ...] = ("e2p", "shuffled", "mean")
    own, other, mean = (run.vectors(kept, c) for c in conditions)
    nobody = Vectors(np.full((1, own.width), np.nan, np.float32), np.zeros(len(kept), np.int64))
    groups = {"e2p": (examples, own), "none": ([fit.examples["none"] for fit in fitted], own)}
    packed = pack_groups(groups, encoder)

    def datasets() -> Iterator[tuple[str, float, PackedDataset]]:
        """One level's vectors at a time."""
        yield "as trained", 0.0, packed["e2p"]
        cold = nobody if run.inputs.config.train.null_user_rate > 0 else mean
        yield "cold start", 0.0, dataclasses.replace(packed["e2p"], vectors=cold)
        yield "none", 0.0, packed["none"]
        for name, (_, disturb, levels) in DISTURBANCES.items():
            for number, level in enumerate(levels):
                a, b = ((vectors.gather() - population.mean) / population.std for vectors in (own, other))
                changed = disturb(a, b, level, np.random.default_rng([2, number]))
                raw = (changed * population.std + population.mean).astype(np.float32)
                yield name, level, dataclasses.replace(packed["e2p"], vectors=Vectors.of(raw))

    scorer = Scorer(run)
    samples = run.inputs.config.evaluate.bootstrap_samples
    points = []
    for name, level, dataset in datasets():
        nll = scorer.example_nll(dataset)
        found = interval("nll_per_target", np.stack([nll, targets], axis=1), users, samples)
        points.append(Point(name, level, *found))
    start = points[0]
    return points + [dataclasses.replace(start, disturbance=name) for name in DISTURBANCES]
