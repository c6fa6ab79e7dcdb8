"""What a token costs each user beyond no token: a mean says nothing of the user whose replies it ruins."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from e2p_jax.errors import shown
from e2p_jax.train.score import Scores

BREAKS = 0.3  # nats a target: a token that costs its user more breaks the model
NAMED = 10  # worst users that are listed though they cost less


class Beyond(NamedTuple):
    """U users, in R derangements."""

    users: list[str]  # U
    nats: np.ndarray  # [R, U] float64: nats a target, less those of the same targets without slots

    @classmethod
    def of(cls, scores: Scores, without: Scores, users: Sequence[str]) -> "Beyond":
        """
        Args:
          scores: of N records, with slots.
          without: of the same without.
          users: N ids.
        """
        names, owner = np.unique(np.asarray(users, str), return_inverse=True)
        sums = np.zeros((len(names), len(scores.drawn)))
        np.add.at(sums, owner, (scores.drawn - without.drawn).T)
        return cls(names.tolist(), sums.T / np.bincount(owner, weights=scores.targets))

    def worst(self, most: int) -> list[tuple[str, float]]:
        """Users and what the worst of their draws costs, the worst first."""
        cost = self.nats.max(axis=0)
        return [(self.users[n], float(cost[n])) for n in np.argsort(-cost, kind="stable")[:most]]

    @property
    def broken(self) -> int:
        """How many users a draw costs more than `BREAKS`."""
        return int((self.nats.max(axis=0) > BREAKS).sum())

    def to_dict(self) -> dict[str, Any]:
        """What `e2p evaluate --json` has: percentiles 0 to 100 over users and draws, and the worst users, `NAMED` of
        them or all whose token breaks the model.
        """
        return {
            "percentiles": np.percentile(self.nats, np.arange(101)).tolist(),
            "broken": self.broken,
            "worst": [{"user_id": user, "nats": nats} for user, nats in self.worst(max(NAMED, self.broken))],
        }

    def warning(self) -> str | None:
        """One line that names the worst of those whose token breaks the model, if there are such."""
        if not self.broken:
            return None
        named = ", ".join(f"{shown(user)} {nats:+.2f}" for user, nats in self.worst(min(self.broken, NAMED)))
        return (
            f"the token breaks the model for {self.broken} of {len(self.users)} users: it costs them more than "
            f"{BREAKS} nats a target beyond none; worst: {named}"
        )


def mean_warning(nats: float) -> str | None:
    """One line, if the mean of all vectors breaks the model: one of no user's, but users may be near it.

    Args:
      nats: a target, beyond nothing in front.
    """
    if nats <= BREAKS:
        return None
    return (
        f"the mean of all users' vectors breaks the model: it costs {nats:+.2f} nats a target beyond none, and so may "
        "the vector of a user of whom little or very much is known; train with a "
        "higher train.bias_learning_rate (0 is sqrt(E) times train.learning_rate)"
    )
