"""Texts that were said and generated."""

import pytest

from e2p_jax.datasets.records import Record

SAID = ["the cat sat on the mat .", "i have a small dog at home and two cats", "the police killed the gunman", "hello"]
GENERATED = ["the cat is on the mat .", "i have a dog at home and a cat", "police kill the gunman", "good morning"]


@pytest.fixture
def talk_records() -> tuple[list[str], list[Record]]:
    """Four replies, and the records whose last turns they stand for."""
    question = {"role": "user", "content": "?"}
    said = [Record(f"u{n}", (), (question, {"role": "assistant", "content": text})) for n, text in enumerate(SAID)]
    return GENERATED, said
