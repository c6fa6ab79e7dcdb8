"""The `e2p` command: thin. Messages go to stderr, data to stdout; exit 0, 1 (failure), 2 (usage) or 75 (run again)."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

# Before anything imports jax or tensorflow_datasets: their C++ parts log to stderr unless told not to.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import absl.logging
import rich.console
import tyro

from e2p_jax.config import Condition, Config, load_config
from e2p_jax.errors import UserError
from e2p_jax.evaluate.generate import Sampling
from e2p_jax.parallel.distributed import RESTART, Preempted, Processes, is_first, session

if TYPE_CHECKING:
    from e2p_jax.evaluate.table import Evaluation

absl.logging.set_verbosity(absl.logging.ERROR)
GREEDY = Sampling()
DETECTED = Processes()


def train(config: Config, name: str, workdir: Path | None) -> None:
    """Trains, then shows the table of conditions, the loss curve and the answers of two held-out users."""
    from e2p_jax.evaluate.curves import draw_loss
    from e2p_jax.evaluate.showcase import show_answers
    from e2p_jax.evaluate.table import evaluate_splits, save
    from e2p_jax.train.loop import train as run_training
    from e2p_jax.train.run import open_run

    directory = run_training(config.resolved(), workdir or Path("runs") / name)
    if is_first():
        _say(f"loss curve: {draw_loss(directory)}")
    if config.evaluate.conditions or config.evaluate.prompts:
        run = open_run(directory)
        evaluations = evaluate_splits(run, config.data.eval_splits, config.evaluate.conditions)
        if is_first():
            save(run, evaluations)
            _print_tables(evaluations)
        show_answers(run, rich.console.Console(quiet=not is_first()))
    if is_first():
        _say(f"run directory: {directory}")


def evaluate(
    run: tyro.conf.Positional[Path],
    /,
    conditions: tuple[Condition, ...] = (),
    split: str | None = None,
    data: Path | None = None,
    embeddings: str | None = None,
    checkpoint: str = "best",
    per_example: Path | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
    processes: Annotated[Processes, tyro.conf.arg(name="")] = DETECTED,
) -> None:
    """Scores a run under several conditions.

    Args:
      run: Run directory.
      conditions: What stands in front: none, e2p, shuffled (another user's vector), text. Default: the run's config.
      split: Split of the run's dataset. Default: all of `data.eval_splits`.
      data: JSON Lines file to score in place of the run's dataset.
      embeddings: Table of user vectors to use in place of the run's.
      checkpoint: best, last, or a step.
      per_example: Write one JSON line per record and condition to this file, in input order.
      as_json: Print JSON to stdout in place of the table.
      processes: Which process this is, where several score together.
    """
    from e2p_jax.evaluate.table import evaluate_splits
    from e2p_jax.files import write_text
    from e2p_jax.train.run import open_run

    with session(processes):
        opened = open_run(run, checkpoint, embeddings)
        config = opened.inputs.config
        if data is not None:
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(data)))
            opened = dataclasses.replace(opened, inputs=dataclasses.replace(opened.inputs, config=config))
        splits = (split,) if split else ("all",) if data else config.data.eval_splits
        evaluations = evaluate_splits(opened, splits, conditions or config.evaluate.conditions)
        if not is_first():
            return
        if per_example is not None:
            write_text(per_example, "".join(evaluation.per_example() for evaluation in evaluations))
        if as_json:
            print(json.dumps({"checkpoint": opened.step, "splits": [each.to_dict() for each in evaluations]}))
        else:
            _print_tables(evaluations)


def _print_tables(evaluations: "Sequence[Evaluation]") -> None:
    from e2p_jax.evaluate.table import render

    for evaluation in evaluations:
        rich.console.Console(width=None if sys.stdout.isatty() else 120).print(render(evaluation))


def generate(
    run: tyro.conf.Positional[Path],
    /,
    user: tuple[str, ...] = (),
    prompt: str | None = None,
    input: Path | None = None,
    embeddings: str | None = None,
    condition: Literal["e2p", "none"] = "e2p",
    checkpoint: str = "best",
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = GREEDY,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Answers prompts as users would.

    Args:
      run: Run directory.
      user: User ids of the table, or @vector.npy; several answer the same prompt in one batch.
      prompt: The user turn to answer.
      input: JSON Lines of {user_id, prompt} or {user_id, messages} to answer in place of --user and --prompt.
      embeddings: Table of user vectors to use in place of the run's.
      condition: e2p, or none: without the soft token.
      checkpoint: best, last, or a step.
      sampling: How tokens are chosen.
      as_json: Print one JSON line per answer: user_id, response.
    """
    from e2p_jax.data.records import Record, read_prompts
    from e2p_jax.evaluate import generate as generation
    from e2p_jax.train.run import open_run

    if (input is None) == (not user or prompt is None):
        raise UserError("give --user and --prompt, or --input FILE.jsonl")
    opened = open_run(run, checkpoint, embeddings)
    if input is not None:
        records = read_prompts(input)
    else:
        message = {"role": "user", "content": prompt or ""}
        records = [Record(name, (), (message,), source=f"--user {name}") for name in user]
    vectors = generation.vectors_for(opened, [r.user_id for r in records], [r.source for r in records], condition)
    for record, reply in zip(records, generation.generate(opened, records, vectors, condition, sampling), strict=True):
        print(json.dumps({"user_id": record.user_id, "response": reply}) if as_json else f"{record.user_id}: {reply}")


def prepare(dataset: tyro.conf.Positional[str], /, manual_dir: Path, data_dir: Path) -> None:
    """Writes a dataset in TFDS form, and prints its directory.

    Args:
      dataset: persona_chat, persona_chat/self_revised, or dialogue_corpus.
      manual_dir: Where the original files lie.
      data_dir: Where prepared datasets go.
    """
    from e2p_jax.data.prepare import prepare as run

    print(run(dataset, manual_dir, data_dir))


def export(
    run: tyro.conf.Positional[Path],
    /,
    out: Path | None = None,
    format: Literal["transformers", "peft", "vllm", "vllm-chat", "sglang", "backbone"] = "transformers",
    include_backbone: bool = False,
    user: tuple[str, ...] = (),
    prompt: str | None = None,
    embeddings: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    checkpoint: str = "best",
) -> None:
    """Writes what a run trained in another program's form.

    Args:
      run: Run directory.
      out: Directory to write; with vllm, vllm-chat and sglang a file. Default for those: stdout.
      format: transformers: a model directory for AutoModelForCausalLM; peft: a prompt-tuning adapter a user; vllm,
        vllm-chat, sglang: a line of JSON a user, the body of a request to /v1/completions, /v1/chat/completions,
        /generate; backbone: a model directory of the backbone alone, for a run that trained it.
      include_backbone: With transformers: copy the backbone's tensors too; else they are named and fingerprinted.
      user: With peft and the engines: user ids, or @vector.npy.
      prompt: With the engines: the user turn to answer.
      embeddings: With peft and the engines: table of user vectors to use in place of the run's.
      dtype: With backbone: of the written tensors.
      checkpoint: best, last, or a step.
    """
    from e2p_jax.export.backbone import export_backbone
    from e2p_jax.export.engines import export_engine
    from e2p_jax.export.peft import export_peft
    from e2p_jax.export.transformers import export_transformers
    from e2p_jax.files import write_text
    from e2p_jax.train.run import open_run

    if format in ("vllm", "vllm-chat", "sglang"):
        if not user or prompt is None:
            raise UserError(f"--format {format}: give --user and --prompt")
        bodies = export_engine(open_run(run, checkpoint, embeddings), format, user, prompt)
        lines = "".join(json.dumps(body) + "\n" for body in bodies)
        if out is None:
            print(lines, end="")
            return
        write_text(out, lines)
        print(out)
        return
    if out is None:
        raise UserError(f"--format {format}: give --out DIR")
    opened = open_run(run, checkpoint, embeddings)
    if format == "transformers":
        export_transformers(opened, out, include_backbone)
    elif format == "peft":
        export_peft(opened, out, user)
    else:
        export_backbone(opened, out, dtype)
    print(out)


def prefixes(
    run: tyro.conf.Positional[Path],
    /,
    out: Path,
    embeddings: str | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16",
    checkpoint: str = "best",
) -> None:
    """Projects every user of a table once, to be looked up when serving; rerun it to resume or to update.

    Args:
      run: Run directory.
      out: Directory to write, or to update.
      embeddings: Table of user vectors to use in place of the run's.
      dtype: Of the soft tokens.
      checkpoint: best, last, or a step.
    """
    from e2p_jax.export.prefix_table import export_prefixes
    from e2p_jax.train.run import open_run

    export_prefixes(open_run(run, checkpoint, embeddings), out, dtype)
    print(out)


def import_run(directory: tyro.conf.Positional[Path], /, out: Path) -> None:
    """Makes a run of an exported transformers directory, to evaluate it or to train it on.

    Args:
      directory: What `e2p export --format transformers` wrote.
      out: Run directory to make; its config.json may be edited before training goes on.
    """
    from e2p_jax.export.import_back import import_transformers

    import_transformers(directory, out)
    _say(f"train on with: e2p train {out / 'config.json'} --workdir {out}")
    print(out)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _train_command(arguments: list[str]) -> Callable[..., None]:
    """`train` with the named config's values as the defaults of its flags."""
    named = arguments[0] if arguments and not arguments[0].startswith("-") else None
    name, defaults = load_config(named) if named else ("", Config())

    def command(
        config: tyro.conf.Positional[str],
        /,
        workdir: Path | None = None,
        processes: Annotated[Processes, tyro.conf.arg(name="")] = DETECTED,
        overrides: Annotated[Config, tyro.conf.arg(name="")] = defaults,
    ) -> None:
        """Trains a projector; rerun the same command to resume.

        Args:
          config: Name of a shipped config (quickstart, persona_chat, ...) or path of a Python file.
          workdir: Run directory. Default: runs/CONFIG.
          processes: Which process this is, where a run has several.
          overrides: Any field of the config.
        """
        with session(processes):
            train(overrides, name, workdir)

    return command


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        rest = arguments[1:] if arguments[:1] == ["train"] else []
        commands: dict[str, Callable[..., Any]] = {
            "train": _train_command(rest),
            "evaluate": evaluate,
            "generate": generate,
            "prepare": prepare,
            "export": export,
            "prefixes": prefixes,
            "import": import_run,
        }
        tyro.extras.subcommand_cli_from_dict(commands, prog="e2p", args=arguments)
    except UserError as error:
        _say(f"e2p: {error}")
        return 1
    except Preempted as stop:
        _say(f"e2p: {stop}")
        return RESTART
    except KeyboardInterrupt:
        _say("e2p: interrupted; rerun the same command to resume")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
