"""Users as the backbone sees them: their soft tokens in two dimensions, the words nearest to them, their answers."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from e2p_jax.config import Condition
from e2p_jax.datasets.bad_records import BadRecords
from e2p_jax.datasets.prepared import load_records
from e2p_jax.datasets.records import Record
from e2p_jax.evaluate.generate import generate
from e2p_jax.options import Sampling
from e2p_jax.train.run import Run

NEAREST = 3  # vocabulary tokens shown for a soft token
BLOCK = 64  # users compared with the vocabulary at once
MOST, APART = 300, 4  # users on the map, and of these who answer


@dataclasses.dataclass(frozen=True)
class UserMap:
    """N users, one record each."""

    records: list[Record]
    places: np.ndarray  # [N, 2], the first two principal components of the users' soft tokens
    explained: float  # share of the soft tokens' variance that the two hold
    nearest: list[list[str]]  # vocabulary tokens, by cosine after the vocabulary's mean is taken off, of all K tokens
    apart: list[int]  # users that lie far from each other, farthest first


def map_users(run: Run, records: Sequence[Record]) -> UserMap:
    """Projects the records' users, `MOST` of them at most.

    Args:
      run: trained on users' vectors.
      records: their context and id are shown.

    Raises:
      UserError: a user without a vector.
    """
    people = list({record.user_id: record for record in records}.values())[:MOST]
    model = run.model.merged
    vectors = run.vectors(people, "e2p").gather()
    soft = np.asarray(model.projector(vectors))  # [N, K, D]
    flat = soft.reshape(len(people), -1)
    centred = flat - flat.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    places = (left * sizes)[:, :2]
    places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))
    power = np.square(sizes)
    explained = float(power[:2].sum()) / max(float(power.sum()), 1e-30)
    return UserMap(people, places, explained, _nearest_tokens(run, soft), _apart(centred, min(APART, len(people))))


def _nearest_tokens(run: Run, soft: np.ndarray) -> list[list[str]]:
    tokenizer, count = run.inputs.encoder.tokenizer, run.inputs.decoder.vocab_size
    model = run.model.merged
    words = np.asarray(model.backbone.embed(jnp.arange(count)[None])[0], np.float32)
    mean = words.mean(axis=0)
    words = words - mean
    words /= np.maximum(np.linalg.norm(words, axis=1, keepdims=True), 1e-9)
    texts = [str(tokenizer.decode([token])).strip() for token in range(count)]
    special = set(tokenizer.all_special_ids)
    readable = np.array(
        [token not in special and text.isprintable() and text != "" for token, text in enumerate(texts)]
    )
    soft = soft - mean
    soft /= np.maximum(np.linalg.norm(soft, axis=2, keepdims=True), 1e-9)  # else a user's longest token decides alone
    out = []
    for first in range(0, len(soft), BLOCK):
        near = np.max(soft[first : first + BLOCK] @ words.T, axis=1)  # [n, V]
        order = np.argsort(-np.where(readable[None], near, -np.inf), axis=1)[:, :NEAREST]
        out += [[texts[token] for token in row] for row in order]
    return out


def _apart(points: np.ndarray, count: int) -> list[int]:
    """Each next one is the farthest from those before it (Gonzalez, 1985); the first is the farthest from the mean."""
    chosen = [int(np.argmax(np.linalg.norm(points, axis=1)))]
    while len(chosen) < count:
        distance = np.linalg.norm(points[:, None] - points[chosen][None], axis=2).min(axis=1)
        chosen.append(int(np.argmax(distance)))
    return chosen


def ask(run: Run, people: Sequence[Record], prompts: Sequence[str], condition: Condition) -> list[list[str]]:
    """Greedy answers: one list a person, one answer a prompt."""
    asked = [
        dataclasses.replace(person, messages=({"role": "user", "content": prompt},), source="evaluate.prompts")
        for person in people
        for prompt in prompts
    ]
    vectors = run.vectors(asked, condition).gather()
    replies = generate(run, asked, vectors, condition, Sampling(max_new_tokens=32))
    return [replies[n : n + len(prompts)] for n in range(0, len(replies), len(prompts))]


def show_answers(run: Run, console: rich.console.Console) -> None:
    """Prints `evaluate.prompts`, greedily answered as two users of the first held-out split with what stood in front in
    training, and without a prefix.
    """
    config = run.inputs.config
    if not config.evaluate.prompts:
        return
    people: dict[str, Record] = {}
    bad = BadRecords(config.data.on_bad_record, config.data.max_bad_share, "--data.on_bad_record")
    for record in load_records(config.data.path, config.data.eval_splits[0], bad):
        people.setdefault(record.user_id, record)
    # Two users whose contexts share as little as possible, so that their answers can differ.
    first = next(iter(people.values()))
    second = min(people.values(), key=lambda r: len(set(r.context) & set(first.context)) + (r is first) * 1000)
    table = rich.table.Table(title="Two held-out users, the same prompts", title_justify="left", show_lines=True)
    table.add_column("prompt")
    condition, answers = config.data.condition, []
    if condition != "none":
        for person in (first, second):
            table.add_column(f"{person.user_id}\n" + "\n".join(person.context))
        answers = ask(run, [first, second], config.evaluate.prompts, condition)
    table.add_column("without prefix")
    answers += ask(run, [first], config.evaluate.prompts, "none")
    for prompt, *replies in zip(config.evaluate.prompts, *answers, strict=True):
        table.add_row(prompt, *replies)
    console.print(table)
