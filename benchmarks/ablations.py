"""Changes of the projector, its place and its training, one at a time, with paired differences to the config as it is.

    python benchmarks/ablations.py runs/ablations --seeds 0 1

trains the quickstart for 100 steps with each change and prints the table; finished runs are reused. With names of
changes only those are trained and shown.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from e2p_jax.config import Config, load_config
from e2p_jax.datasets import synthetic
from e2p_jax.evaluate.compare import compare_seeds, pool
from e2p_jax.evaluate.evaluation import Evaluation
from e2p_jax.evaluate.measures import difference
from e2p_jax.files import write_text

CONDITIONS = ("none", "shuffled", "e2p")
Change = Callable[[Config, Path], Config]


def fields(section: str, **values: Any) -> Change:
    """Sets fields of a section."""
    return lambda config, _: dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **values)}
    )


def reconstruction(config: Config, directory: Path) -> Config:
    """Beside every training conversation another, in which the user says the whole context."""
    lines = []
    for split in ("train", "validation"):
        for record in synthetic.records(split):
            told = (
                {"role": "user", "content": "who are you?"},
                {"role": "assistant", "content": " ".join(record.context)},
            )
            for messages in (record.messages, told) if split == "train" else (record.messages,):
                values = {"user_id": record.user_id, "context": record.context, "messages": messages, "split": split}
                lines.append(json.dumps(values) + "\n")
    path = directory / "reconstruction.jsonl"
    write_text(path, "".join(lines))
    return fields("data", path=str(path))(config, directory)


CHANGES: dict[str, Change] = {
    "as it is": lambda config, _: config,
    "2 soft tokens": fields("projector", num_tokens=2),
    "4 soft tokens": fields("projector", num_tokens=4),
    "linear": fields("projector", kind="linear"),
    "linear, 4 soft tokens": fields("projector", kind="linear", num_tokens=4),
    "hidden layer of 128": fields("projector", hidden_size=128),
    "hidden layer of 2048": fields("projector", hidden_size=2048),
    "no dropout": fields("projector", dropout=0.0),
    "noise of 0.5": fields("projector", noise=0.5),
    "before BOS": fields("prefix", placement="before_bos"),
    "in the first user turn": fields("prefix", placement="in_chat"),
    "null user, a tenth": fields("train", null_user_rate=0.1),
    "reconstruction of the context": reconstruction,
}


def main(
    directory: tyro.conf.Positional[Path],
    changes: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    seeds: tuple[int, ...] = (0,),
    steps: Annotated[int, tyro.conf.arg(help="Of each run; the learning rate falls to its end in them.")] = 100,
) -> None:
    base = load_config("quickstart")[1]
    base = dataclasses.replace(
        base, train=dataclasses.replace(base.train, steps=steps, eval_every=steps, warmup_steps=steps // 5)
    )
    directory.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(["as it is", *(changes or CHANGES)]))
    found: dict[str, Evaluation] = {}
    for name in names:
        place = directory / name.replace(",", "").replace(" ", "-")
        by_seed = compare_seeds(CHANGES[name](base, directory), place, CONDITIONS, seeds)
        found[name] = pool([splits[0] for splits in by_seed.values()])
    print("| change | NLL | minus `none` | minus `shuffled` | minus unchanged |")
    print("|---|---|---|---|---|")
    for name, evaluation in found.items():
        cells = [f"{evaluation.scores['e2p'].per_target:.4f}"]
        ours = evaluation.scores["e2p"].statistics["nll_per_target"]
        users = [record.user_id for record in evaluation.records]
        references = [evaluation.scores[other] for other in ("none", "shuffled")] + [found["as it is"].scores["e2p"]]
        for reference in references:
            theirs = reference.statistics["nll_per_target"]
            apart = difference("nll_per_target", ours, theirs, users, evaluation.bootstrap_samples)
            cells.append(f"{apart.mean:+.4f} [{apart.low:+.4f}, {apart.high:+.4f}]")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
