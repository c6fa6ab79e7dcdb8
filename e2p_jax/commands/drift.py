"""`e2p drift`."""

import dataclasses
import json
from typing import Annotated

import tyro

from e2p_jax.commands.common import RunPath
from e2p_jax.errors import UsageError


def drift(
    run: tyro.conf.Positional[RunPath],
    /,
    old: str,
    new: str,
    split: str | None = None,
    keep: float = 0.9,
    checkpoint: str = "best",
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Compares two versions of a table of user vectors, and says whether the projector needs retraining.

    Args:
      run: Run directory, trained on the old table.
      old: Table of user vectors.
      new: Table of the same users' newer vectors.
      split: Split whose users and conversations are taken. Default: the first of `data.eval_splits`.
      keep: Retraining is advised where less than this share of the own vector's gain over another user's is left, by
        the whole of its 95 % interval; keeping, where all of it is above. In between the data does not tell.
      checkpoint: best, last, or a step.
      as_json: Print JSON to stdout in place of the text.
    """
    from e2p_jax.datasets.prepared import load_table
    from e2p_jax.evaluate.drift import drift as compare
    from e2p_jax.evaluate.evaluation import read_splits
    from e2p_jax.evaluate.measures import p_text
    from e2p_jax.train.run import open_run

    if not 0 < keep <= 1:
        raise UsageError("--keep must be above 0 and at most 1")
    opened = open_run(run, checkpoint)
    data = opened.inputs.config.data
    name = split or data.eval_splits[0]
    found = compare(opened, read_splits(data, [name])[name], load_table(old, "null"), load_table(new, "null"), keep)
    if as_json:
        print(json.dumps(dataclasses.asdict(found) | {"verdict": found.verdict()}))
        return
    change = found.nll_change
    print(f"users of {name} in both tables: {found.users}, others: {found.missing}")
    print(f"cosine, old to new vector: {found.cosine:.3f}, after the best rotation: {found.aligned_cosine:.3f}")
    print(f"change of the soft tokens, in units of how users' tokens differ: {found.token_change:.3f}")
    print(
        f"NLL per target, new minus old: {change.mean:+.4f} [{change.low:+.4f}, {change.high:+.4f}], "
        f"p {p_text(change.p, change.p_least)}"
    )
    gains = ", ".join(
        f"{name} {gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"
        for name, gain in (("old", found.gain_old), ("new", found.gain_new))
    )
    print(f"own vector better than another user's by: {gains}")
    print(found.verdict())
