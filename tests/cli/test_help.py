"""`--help`, the config that is named, and what is set and loaded before a command runs."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from e2p_jax.cli import commands_of, main, set_environment
from e2p_jax.commands.common import damaged_programs_removed


@pytest.mark.parametrize("command", [*(c for c in commands_of([]) if c != "data"), "data stats", "data show"])
def test_help_documents_every_flag(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    flags = re.split(r"^ +(?=--?[a-z])", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    for flag in flags:  # the flag and its values, two spaces or a new line, what it means, its default
        meaning = re.split(r"  +|\n", flag, maxsplit=1)[1]
        assert re.match(r"(\s*\.\.\.\]+)?\s*\w", re.split(r"\((?:default|required|optional)", meaning)[0]), flag
    assert len(flags) > 1


def test_a_reader_who_leaves_early_is_no_error():
    command = f"{sys.executable} -m e2p_jax train quickstart --help | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith("usage") and done.returncode in (0, 1) and not done.stderr


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, e2p_jax.cli; print([m for m in ('jax', 'numpy', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


CONFIGS = """
import dataclasses
from e2p_jax.config import Config, DataConfig, TrainConfig
config = Config(data=DataConfig(path="nowhere.jsonl"), train=TrainConfig(steps=77))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        "train mine.py --workdir run",
        "train --workdir run mine.py",
        "train --workdir run mine.py --train.rows 4",
        "train --evaluate.conditions none text --workdir run mine.py",
        "compare --conditions none --workdir run mine.py",
        "data stats --json mine.py",
        "data --rows 2 show mine.py",
    ],
)
def test_the_config_is_found_wherever_it_stands(
    arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CONFIGS)
    assert main(arguments.split()) == 1
    assert "nowhere.jsonl" in capsys.readouterr().err  # not the default, which trains
    with pytest.raises(SystemExit):
        main([*arguments.split(), "--help"])
    assert re.search(r"--train\.steps INT\s.*?default: 77\)", capsys.readouterr().out, re.DOTALL)


def test_help_of_plan_shows_the_named_config(capsys: pytest.CaptureFixture[str]):
    for arguments in ("plan llama_8b --help", "plan --topology v5e:4x4 llama_8b --help"):
        with pytest.raises(SystemExit):
            main(arguments.split())
        assert "default: meta-llama/Llama-3.1-8B" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("given", [None, "", "/elsewhere"])
def test_compiled_steps_are_kept_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, given: str | None) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    if given is not None:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", given)
    set_environment("train")
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == ("/cache/e2p_jax" if given is None else given)


@pytest.mark.filterwarnings("default:Error reading persistent compilation cache entry")
def test_a_damaged_program_is_compiled_anew_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """What a kill or a full disk left of a file that JAX writes in place, and never over."""
    compilation_cache.reset_cache()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    settings = {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in settings}

    def compile_in_a_new_process() -> None:
        jax.clear_caches()
        with damaged_programs_removed():
            jax.jit(lambda x: x + 1)(jnp.ones(3))

    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        compile_in_a_new_process()
        (program,) = tmp_path.glob("jit__lambda-*-cache")
        program.write_bytes(program.read_bytes()[:100])
        compile_in_a_new_process()
        told = f"{tmp_path}: the compiled program jit__lambda was damaged; it is compiled and kept anew\n"
        assert capsys.readouterr().err == told and program.stat().st_size > 100
        compile_in_a_new_process()
        assert capsys.readouterr().err == ""
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.mark.filterwarnings("always:Error reading persistent")
def test_compiled_programs_without_a_place_are_told_of_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a home that is not there, or can only be read: nothing was damaged, and nothing is kept."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "absent"))
    with damaged_programs_removed():
        for name in ("jit_a", "jit_b"):
            warnings.warn(
                f"Error reading persistent compilation cache entry for '{name}': PermissionError", stacklevel=1
            )
    said = capsys.readouterr().err
    assert said.count("cannot be written; set JAX_COMPILATION_CACHE_DIR") == 1 and "damaged" not in said
