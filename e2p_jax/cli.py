"""The `e2p` command: thin. Messages go to stderr, data to stdout; exit 0, 1 (failure), 2 (usage) or 75 (run again)."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import absl.logging
import tyro

from e2p_jax.commands.common import damaged_programs_removed, with_config
from e2p_jax.errors import RESTART, Preempted, UsageError, UserError, explain_open_files
from e2p_jax.registry import load_plugins
from e2p_jax.terminal import flush_or_drop, prepare_streams, say

HALF = re.compile("[\ud800-\udfff]")  # what Python makes of an argument's bytes that are not UTF-8


def set_environment(command: str) -> None:
    """Sets what jax, tensorflow_datasets and transformers read when they are imported, later, by the command."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # their C++ parts log to stderr unless told not to
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is absent
    os.environ.setdefault("EPATH_USE_TF", "0")  # gs:// is gcsfs's, whether TensorFlow is there or not
    if command == "plan":  # jax must not look for TPUs that are not here
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        # What is compiled for absent devices is written to the cache, but cannot be read from it.
        os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
    # What was compiled once is loaded from then on; a variable that is set, even to nothing, holds.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "e2p_jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    absl.logging.set_verbosity(absl.logging.ERROR)


def commands_of(arguments: list[str]) -> dict[str, Callable[..., Any]]:
    """Every command; the flags of those that take a config default to the values of the config that is named.

    They are imported here, after the plugins: their help names what those add.
    """
    from e2p_jax.commands.data import data_command, embed, prepare
    from e2p_jax.commands.evaluate import drift, evaluate, report
    from e2p_jax.commands.export import convert, export, import_run, prefixes, rollback
    from e2p_jax.commands.generate import demo, generate
    from e2p_jax.commands.inspect import inspect
    from e2p_jax.commands.plan import plan_command
    from e2p_jax.commands.serve import serve
    from e2p_jax.commands.train import compare_command, train_command

    command, rest = arguments[:1], arguments[1:]
    return {
        "train": with_config(train_command, rest if command == ["train"] else []),
        "compare": with_config(compare_command, rest if command == ["compare"] else []),
        "plan": with_config(plan_command, rest if command == ["plan"] else []),
        "evaluate": evaluate,
        "drift": drift,
        "report": report,
        "generate": generate,
        "demo": demo,
        "prepare": prepare,
        "embed": embed,
        "convert": convert,
        "inspect": inspect,
        "data": with_config(data_command, rest if command == ["data"] else []),
        "export": export,
        "prefixes": prefixes,
        "rollback": rollback,
        "serve": serve,
        "import": import_run,
    }


def refuse_unset(arguments: list[str]) -> None:
    """Refuses what a shell makes of a variable that is unset, and of a name in another encoding.

    Raises:
      UsageError: an argument, or a flag's value, is empty or is not UTF-8.
    """
    for place, argument in enumerate(arguments, start=1):
        flag, is_pair, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if not value and (is_pair or not flag):
            where = flag or (arguments[place - 2] if place > 1 else "")
            raise UsageError(f"argument {place}, after {where or 'e2p'}, is empty: give a value, or leave its flag out")
        if HALF.search(argument):
            raise UsageError(f"argument {place}, {argument!r}, is not UTF-8; write it in UTF-8, or rename the file")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    prepare_streams()
    try:
        try:
            refuse_unset(arguments)
            set_environment("".join(arguments[:1]))
            load_plugins()
            with damaged_programs_removed(), explain_open_files():
                tyro.extras.subcommand_cli_from_dict(commands_of(arguments), prog="e2p", args=arguments)
        finally:
            sys.stdout.flush()  # help, too, leaves by SystemExit
    except UserError as error:
        say(f"e2p: {error}")
        return 2 if isinstance(error, UsageError) else 1
    except Preempted as stop:
        say(f"e2p: {stop}")
        return RESTART
    except BrokenPipeError:  # the reader (`| head`) has what it wanted
        flush_or_drop()
        return 1
    except OSError as error:  # a path too long, no permission, no space: the system's words name the file
        flush_or_drop()
        say(f"e2p: {error}")
        return 1
    except KeyboardInterrupt:
        say("e2p: interrupted; rerun the same command to resume")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
