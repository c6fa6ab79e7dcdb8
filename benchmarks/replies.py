"""Every reply of every dialogue as a record that ends with it, for `e2p evaluate`, which ranks last replies.

    python benchmarks/replies.py data/mixed.jsonl replies.jsonl --split validation
    e2p evaluate RUN --data replies.jsonl --split all --conditions shuffled e2p --derangements 1 --measures ranking

`evaluate.max_records` of the run must be 0, or 200 of them, evenly spaced, are all that is ranked. A reply that opens a
dialogue is left out: nothing was said that candidates could answer.
"""

import dataclasses
import json
from pathlib import Path

import tyro

from e2p_jax.datasets.prepared import load_records
from e2p_jax.files import write_text


def main(path: str, out: Path, /, split: str = "validation") -> None:
    """Writes the records.

    Args:
      path: prepared dataset's directory, or a JSON Lines file.
      out: JSON Lines file to write.
      split: of it.
    """
    lines = []
    for record in load_records(path, split):
        fields = {name: value for name, value in dataclasses.asdict(record).items() if value and name != "source"}
        for place, message in enumerate(record.messages):
            if message["role"] == "assistant" and place:
                lines.append(json.dumps(fields | {"messages": record.messages[: place + 1]}, ensure_ascii=False) + "\n")
    write_text(out, "".join(lines))
    print(f"{len(lines)} replies")


if __name__ == "__main__":
    tyro.cli(main)
