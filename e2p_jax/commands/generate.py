"""`e2p generate` and `e2p demo`."""

import json
from pathlib import Path
from typing import Annotated

import tyro

from e2p_jax.commands.common import Checkpoint, Embeddings, Run
from e2p_jax.config import Condition
from e2p_jax.errors import UsageError, UserError
from e2p_jax.options import Sampling
from e2p_jax.terminal import printable

GREEDY = Sampling()


def generate(
    run: Run,
    /,
    user: tuple[str, ...] = (),
    prompt: str | None = None,
    input: Path | None = None,
    embeddings: Embeddings = None,
    condition: Condition | None = None,
    checkpoint: Checkpoint = "best",
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = GREEDY,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Answers prompts as users would.

    Args:
      user: User ids of the table, or @vector.npy, the vector in a file (@@alice is the user @alice); several answer the
        same prompt in one batch.
      prompt: The user turn to answer.
      input: JSON Lines of {user_id, prompt} or {user_id, messages} to answer in place of --user and --prompt.
      condition: What stands in front: e2p, none, or any that `e2p evaluate` knows; where it is text, the `context` of
        --input. Default: what did in training.
      sampling: How tokens are chosen.
      as_json: Print one JSON line per answer: user_id, response, and of a run with `items.token` the item.
    """
    from e2p_jax.data.conditions import FRONTS
    from e2p_jax.datasets.records import Record, read_prompts
    from e2p_jax.evaluate import generate as generation
    from e2p_jax.train.run import open_run

    if (input is None) == (not user or prompt is None):
        raise UsageError("give --user and --prompt, or --input FILE.jsonl")
    opened = open_run(run, checkpoint, embeddings)
    condition = condition or opened.inputs.config.data.condition
    if input is not None:
        records = read_prompts(input)
        users, where = [r.user_id for r in records], [r.source for r in records]
        vectors = generation.vectors_for(opened, users, where, condition)
    else:
        names, vectors = generation.asked_for(opened, user, condition)
        message = {"role": "user", "content": prompt or ""}
        records = [Record(name, (), (message,), source=f"--user {name}") for name in names]
    if FRONTS[condition].context and not any(record.context for record in records):
        raise UserError(f"condition {condition} puts texts in front, and none are given: --input with `context`")
    replies = generation.reply(opened, records, vectors, condition, sampling)
    for record, (text, item) in zip(records, replies, strict=True):
        if as_json:
            picked = {} if item is None else {"item": item}
            print(json.dumps({"user_id": record.user_id, **picked, "response": text}))
        else:
            print(f"{printable(record.user_id)}: {printable(text, lines=True)}")


def demo(
    run: Run,
    /,
    port: int = 7860,
    embeddings: Embeddings = None,
    checkpoint: Checkpoint = "best",
) -> None:
    """Serves a page, to this machine alone, that answers as several users: with their soft tokens, without, swapped.

    Args:
      port: Of the page, on 127.0.0.1.
    """
    from e2p_jax.train.run import open_run

    if not 0 < port < 2**16:
        raise UsageError("--port must be from 1 to 65535")
    try:
        from e2p_jax.export.demo import serve
    except ModuleNotFoundError as error:
        raise UserError(f"e2p demo needs Gradio ({error}): pip install 'e2p-jax[demo]'") from error
    serve(open_run(run, checkpoint, embeddings), port)
