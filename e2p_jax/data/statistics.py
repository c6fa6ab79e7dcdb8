"""Counts what a config's data comes to: lengths, targets, rows, drops, vectors, and leaks between splits."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import rich.table
import xxhash

from e2p_jax.config import Config
from e2p_jax.data.columns import Ragged
from e2p_jax.data.conditions import spelled_out
from e2p_jax.data.encode import Encoder
from e2p_jax.data.examples import Examples
from e2p_jax.data.packing import choose_budget, plan_rows
from e2p_jax.data.training import read_training
from e2p_jax.datasets.records import Record
from e2p_jax.vectors.index import distinct
from e2p_jax.vectors.population import Moments, blocks
from e2p_jax.vectors.table import UserTable

_PERCENTILES = {"least": 0, "p5": 5, "median": 50, "p95": 95, "most": 100}


def statistics(config: Config, encoder: Encoder, table: UserTable | None) -> dict[str, Any]:
    """Of every split that the config names, as a run would see it.

    Args:
      table: opened with `missing="null"`, so that users without a vector are counted.

    Returns:
      `splits` (by name: `train`, `dev`, those reported), `skipped`, and `vectors` (of the training users) if there is a
      table: plain numbers and texts.

    Raises:
      UserError: the data is at fault.
    """
    read = read_training(config, encoder)
    held_out = ({"dev": read.dev} if read.dev else {}) | read.reported
    examples = {"train": read.examples}
    dropped = {"train": read.dropped_messages}
    for name, records in held_out.items():
        examples[name], dropped[name] = _encode(records, encoder, config)
    splits = {}
    for name, held in examples.items():
        splits[name] = {
            **_sizes(held, encoder),
            "dropped_messages": dropped[name],
            "users_without_vector": _absent(held, table),
            "leaks": _leaks(held, read.examples) if name != "train" else None,
        }
    result: dict[str, Any] = {"condition": config.data.condition, "splits": splits, "skipped": read.skipped}
    if table is not None:
        rows = distinct(table.rows(read.examples.users, read.examples.sources))
        result["vectors"] = _vectors(table, rows[rows >= 0])
    return result


def _encode(records: Sequence[Record], encoder: Encoder, config: Config) -> tuple[Examples, int]:
    condition = config.data.condition
    fitted = [encoder.fit(record, [condition]) for record in spelled_out(records, condition)]
    examples = Examples.of(fit.examples[condition] for fit in fitted)
    return examples, sum(fit.dropped_messages for fit in fitted)


def _sizes(examples: Examples, encoder: Encoder) -> dict[str, Any]:
    budget = choose_budget(examples, encoder.max_length)
    rows = plan_rows(examples, budget)
    records_a_user = np.unique(_users(examples), return_counts=True)[1]
    return {
        "records": len(examples),
        "users": len(records_a_user),
        "users_with_several_records": int((records_a_user > 1).sum()),
        "repeated_conversations": len(examples) - len(distinct(_conversations(examples))),
        "tokens": len(examples.tokens),
        "targets": int(examples.target_counts.sum()),
        "tokens_a_record": _spread(examples.lengths),
        "targets_a_record": _spread(examples.target_counts),
        "rows": len(rows),
        "row_budget": {name: int(size) for name, size in budget._asdict().items()},
        "segments_a_row": _spread(np.diff(rows.ends, prepend=0)),
        "full": len(examples.tokens) / (len(rows) * budget.tokens),
        "targets_full": int(examples.target_counts.sum()) / (len(rows) * budget.targets),
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    return {name: float(np.percentile(values, at)) for name, at in _PERCENTILES.items()}


def _hashes(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """[N] uint64: in place of what would not fit in memory, where there are millions."""
    return np.fromiter((xxhash.xxh3_64_intdigest(array.tobytes()) for array in arrays), np.uint64)


def _users(examples: Examples) -> np.ndarray:
    return _hashes(Ragged(examples.user_text, examples.user_ends))


def _conversations(examples: Examples) -> np.ndarray:
    return _hashes(Ragged(examples.tokens, examples.ends))


def _leaks(examples: Examples, train: Examples) -> dict[str, int]:
    """The overlap of a split with training."""
    users, trained = _users(examples), _users(train)
    return {
        "users_in_train": len(np.intersect1d(users, trained)),
        "records_of_users_in_train": int(np.isin(users, trained).sum()),
        "conversations_in_train": int(np.isin(_conversations(examples), _conversations(train)).sum()),
    }


def _absent(examples: Examples, table: UserTable | None) -> int | None:
    if table is None:
        return None
    absent = table.rows(examples.users, examples.sources) < 0
    return len(distinct(_users(examples)[absent]))


def _vectors(table: UserTable, rows: np.ndarray) -> dict[str, Any]:
    """Of the training users who have one, block by block."""
    if not len(rows):
        return {"table": table.source, "users": len(table), "width": table.width}
    moments = Moments.of(blocks(table, rows))
    norms = np.concatenate([np.linalg.norm(block, axis=1) for block in blocks(table, rows)])
    # Zero has two signs.
    hashes = _hashes(vector for block in blocks(table, rows) for vector in block + np.float32(0))
    return {
        "table": table.source,
        "users": len(table),
        "width": table.width,
        "dtype": table.vectors.dtype.name,
        "norm": _spread(norms),
        "largest_mean": float(np.abs(moments.mean).max()),
        "std": _spread(moments.std),
        "dimensions_that_never_vary": int((moments.std <= 1e-6).sum()),
        "users_with_the_vector_of_another": len(rows) - len(distinct(hashes)),
    }


def render(values: dict[str, Any]) -> list[rich.table.Table]:
    """The tables people read."""
    splits = values["splits"]
    table = rich.table.Table(title=f"data, condition {values['condition']}", title_justify="left")
    table.add_column("")
    for name in splits:
        table.add_column(name, justify="right")

    def row(label: str, *path: str, as_share: bool = False) -> None:
        cells = []
        for split in splits.values():
            value: Any = split
            for key in path:
                value = None if value is None else value[key]
            cells.append(f"{value:.1%}" if as_share else _cell(value))
        table.add_row(label, *cells)

    row("records", "records")
    row("users", "users")
    row("users with several records", "users_with_several_records")
    row("users without a vector", "users_without_vector")
    row("conversations said before", "repeated_conversations")
    row("users also in train", "leaks", "users_in_train")
    row("their records", "leaks", "records_of_users_in_train")
    row("conversations also in train", "leaks", "conversations_in_train")
    row("old messages dropped", "dropped_messages")
    row("tokens", "tokens")
    row("tokens per record: least p5 median p95 most", "tokens_a_record")
    row("targets", "targets")
    row("targets per record", "targets_a_record")
    row("rows", "rows")
    row("tokens, targets, segments, items of a row, its longest", "row_budget")
    row("segments per row", "segments_a_row")
    row("share of the rows' tokens used", "full", as_share=True)
    row("share of the rows' targets used", "targets_full", as_share=True)
    tables = [table]
    if values["skipped"]:
        table.caption, table.caption_justify = values["skipped"], "left"
    if "vectors" in values:
        vectors = rich.table.Table(title="vectors of the training users", title_justify="left")
        vectors.add_column("")
        vectors.add_column("", justify="right")
        for name, value in values["vectors"].items():
            vectors.add_row(name.replace("_", " "), _cell(value))
        tables.append(vectors)
    return tables


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return " ".join(_cell(each) for each in value.values())
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}"
    return f"{int(value):,}" if isinstance(value, int | float) else str(value)
