"""Rows as the model gets them, for a person to read."""

import itertools
from collections.abc import Iterator

import numpy as np
import rich.text
from transformers import PreTrainedTokenizerBase

from e2p_jax.data.pipeline import PackedDataset
from e2p_jax.terminal import printable

SLOT, TARGET = "black on magenta", "bold green"


def show_row(
    dataset: PackedDataset, row: int, tokenizer: PreTrainedTokenizerBase, *, marks: bool
) -> Iterator[rich.text.Text]:
    """A line that sums the row up, and one or more for each segment: slots, and targets among what they answer.

    Read off the arrays that training gets, not off the examples they were made from.

    Args:
      row: its number in the dataset.
      marks: say in brackets what colours say on a terminal: `<slot 0>`, `[[target]]`.
    """
    batch = {name: array[0] for name, array in dataset.batch([row]).items()}
    used = batch["target_weights"] > 0
    is_target = np.zeros(len(batch["tokens"]), bool)
    is_target[batch["target_positions"][used] + 1] = True
    padding = int((batch["segment_ids"] == 0).sum())
    members = dataset.rows[row]
    yield rich.text.Text(
        f"row {row}: {len(members)} segments, {len(is_target) - padding} tokens and {padding} of padding, "
        f"{int(used.sum())} of {len(used)} targets",
        style="bold",
    )
    for segment, number in enumerate(members):
        places = np.flatnonzero(batch["segment_ids"] == segment + 1)
        user = printable(dataset.examples.users[number])
        vector = batch["user_embeddings"][segment]
        line = rich.text.Text(f"  segment {segment + 1}, user {user}")
        if (batch["slots"][places] >= 0).any():
            known = "null user" if np.isnan(vector[0]) else f"vector of length {np.linalg.norm(vector):.3g}"
            line.append(f", {known}")
        yield line.append(f", {len(places)} tokens at {places[0]}:")
        text = rich.text.Text("    ")
        for (slot, target), run in itertools.groupby(places, lambda p: (int(batch["slots"][p]), bool(is_target[p]))):
            ids = [int(batch["tokens"][place]) for place in run]
            if slot >= 0:
                text.append(f"<slot {slot}>", style=SLOT)
                continue
            words = printable(str(tokenizer.decode(ids, skip_special_tokens=False)), lines=True).replace("\n", "\n    ")
            text.append(f"[[{words}]]" if marks and target else words, style=TARGET if target else "")
        yield text
