"""Two held-out users answer the same prompts."""

import rich.console
import rich.table

from e2p_jax.config import Condition
from e2p_jax.datasets.bad_records import BadRecords
from e2p_jax.datasets.prepared import load_records
from e2p_jax.datasets.records import Record
from e2p_jax.evaluate.users import ask
from e2p_jax.train.run import Run


def show_answers(run: Run, console: rich.console.Console) -> None:
    """Prints `evaluate.prompts`, greedily answered as two users of the first held-out split, and without a prefix."""
    config = run.inputs.config
    if not config.evaluate.prompts:
        return
    people: dict[str, Record] = {}
    bad = BadRecords(config.data.on_bad_record, config.data.max_bad_share)
    for record in load_records(config.data.path, config.data.eval_splits[0], bad):
        people.setdefault(record.user_id, record)
    # Two users whose contexts share as little as possible, so that their answers can differ.
    first = next(iter(people.values()))
    second = min(people.values(), key=lambda r: len(set(r.context) & set(first.context)) + (r is first) * 1000)
    table = rich.table.Table(title="Two held-out users, the same prompts", title_justify="left", show_lines=True)
    table.add_column("prompt")
    for person in (first, second):
        table.add_column(f"{person.user_id}\n" + "\n".join(person.context))
    table.add_column("without prefix")
    columns: list[tuple[Record, Condition]] = [(first, "e2p"), (second, "e2p"), (first, "none")]
    answers = [ask(run, [person], config.evaluate.prompts, condition)[0] for person, condition in columns]
    for prompt, *replies in zip(config.evaluate.prompts, *answers, strict=True):
        table.add_row(prompt, *replies)
    console.print(table)
