"""What commands are given: thirty users' records and vectors."""

from pathlib import Path

import numpy as np
import pytest
from arguments import USERS

from e2p_jax.datasets import synthetic
from e2p_jax.datasets.records import write_jsonl
from e2p_jax.vectors.table import save_table


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """records.jsonl of 30 users without splits, and their table."""
    folder = tmp_path_factory.mktemp("place")
    write_jsonl([synthetic.record(user) for user in USERS], folder / "records.jsonl")
    vectors = np.stack([synthetic.vector(user) for user in USERS])
    save_table(folder / "table", [f"user-{user}" for user in USERS], vectors, name="synthetic", version="1")
    return folder
