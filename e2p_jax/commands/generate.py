"""`e2p generate`."""

import json
from pathlib import Path
from typing import Annotated

import tyro

from e2p_jax.commands.common import RunPath
from e2p_jax.config import Condition
from e2p_jax.errors import UsageError
from e2p_jax.options import Sampling
from e2p_jax.terminal import printable

GREEDY = Sampling()


def generate(
    run: tyro.conf.Positional[RunPath],
    /,
    user: tuple[str, ...] = (),
    prompt: str | None = None,
    input: Path | None = None,
    embeddings: str | None = None,
    condition: Condition = "e2p",
    checkpoint: str = "best",
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = GREEDY,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Answers prompts as users would.

    Args:
      run: Run directory.
      user: User ids of the table, or @vector.npy, the vector in a file (@@alice is the user @alice); several answer the
        same prompt in one batch.
      prompt: The user turn to answer.
      input: JSON Lines of {user_id, prompt} or {user_id, messages} to answer in place of --user and --prompt.
      embeddings: Table of user vectors to use in place of the run's.
      condition: What stands in front: e2p, none, or any that `e2p evaluate` knows.
      checkpoint: best, last, or a step.
      sampling: How tokens are chosen.
      as_json: Print one JSON line per answer: user_id, response.
    """
    from e2p_jax.datasets.records import Record, read_prompts
    from e2p_jax.evaluate import generate as generation
    from e2p_jax.train.run import open_run

    if (input is None) == (not user or prompt is None):
        raise UsageError("give --user and --prompt, or --input FILE.jsonl")
    opened = open_run(run, checkpoint, embeddings)
    if input is not None:
        records = read_prompts(input)
        users, where = [r.user_id for r in records], [r.source for r in records]
        vectors = generation.vectors_for(opened, users, where, condition)
    else:
        names, vectors = generation.asked_for(opened, user, condition)
        message = {"role": "user", "content": prompt or ""}
        records = [Record(name, (), (message,), source=f"--user {name}") for name in names]
    for record, reply in zip(records, generation.generate(opened, records, vectors, condition, sampling), strict=True):
        if as_json:
            print(json.dumps({"user_id": record.user_id, "response": reply}))
        else:
            print(f"{printable(record.user_id)}: {printable(reply, lines=True)}")
