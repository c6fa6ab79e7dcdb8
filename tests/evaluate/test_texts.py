"""Measures on texts against published examples."""

import dataclasses

import numpy as np
import pytest

from e2p_jax.datasets.records import Record
from e2p_jax.evaluate.measures import distinct, text_statistics, word_f1

Talk = tuple[list[str], list[Record]]


def test_word_f1():
    """ParlAI's: articles, case and punctuation do not count."""
    assert word_f1("The dog!", "a dog") == 1.0
    assert word_f1("i like red cars", "i like blue cars too") == pytest.approx(2 * 3 / 9)
    assert word_f1("yes yes", "yes") == pytest.approx(2 / 3)  # a word counts as often as it is there
    assert word_f1("", "hello") == 0.0


def test_rouge_of_the_published_example(talk_records: Talk):
    """Lin (2004), section 3: "police kill the gunman" shares 3 words in order with "police killed the gunman", 4 where
    the stemmer makes one of `kill` and `killed`; the reference here has one more word in front.
    """
    replies, records = talk_records
    statistics = text_statistics(replies, records)
    assert statistics["rougeL"][2].tolist() == pytest.approx([8 / 9, 1])  # precision 4/4, recall 4/5
    assert statistics["rouge2"][0, 0] == pytest.approx(3 / 5)  # the cat, on the, the mat of five pairs each
    assert statistics["rouge1"][3, 0] == 0
    assert "rougeL_best" not in statistics


def test_best_of_references(talk_records: Talk):
    replies, records = talk_records
    records[3] = dataclasses.replace(records[3], references=("good morning", "hi"))
    statistics = text_statistics(replies, records)
    assert statistics["rouge1_best"][3, 0] == 1.0
    np.testing.assert_array_equal(statistics["rouge1_best"][:3], statistics["rouge1"][:3])


def test_distinct():
    """Li et al.: distinct n-grams over all n-grams, of all replies together."""
    assert distinct(["i do not know", "i do not"], 1) == pytest.approx(4 / 7)
    assert distinct(["i do not know", "i do not"], 2) == pytest.approx(3 / 5)
    assert distinct(["yes"], 2) == 0.0
