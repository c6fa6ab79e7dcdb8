"""Reads what users' vectors are made of, out of any data."""

from e2p_jax.datasets.prepared import load_records, split_names


def first_contexts(path: str) -> dict[str, tuple[str, ...]]:
    """Each user's context as their first record has it: one that comes later may tell what an earlier one asks for.

    Splits are read in the order the data has them, `train` first.

    Args:
      path: as `data.path`.

    Returns:
      User id -> the context's texts that are not blank.

    Raises:
      UserError: no such data, or a record is malformed.
    """
    found: dict[str, tuple[str, ...]] = {}
    for split in sorted(split_names(path), key=lambda name: name != "train"):
        for record in load_records(path, split):
            found.setdefault(record.user_id, tuple(text for text in record.context if text.strip()))
    return found
