"""Ruff and mypy find nothing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"]], ids=" ".join)
def test_clean(command: list[str]):
    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr


def test_package_and_examples_are_well_typed(tmp_path: Path):
    """In one run: what mypy learns of the libraries takes most of its time."""
    for page in ["library", "serving", "export"]:
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.DOTALL)
        (tmp_path / f"{page}.py").write_text("\n".join(blocks))
    wrong = tmp_path / "wrong.py"  # the examples are looked at with the package's types, not as `Any`
    wrong.write_text((tmp_path / "library.py").read_text() + "nats.nothing\nreplies + 1\n")
    done = run("mypy", "e2p_jax", *map(str, sorted(tmp_path.glob("*.py"))))
    assert re.findall(r"(\w+)\.py:\d+: error:", done.stdout) == ["wrong", "wrong"], done.stdout + done.stderr


def test_files_of_tests_have_names_of_their_own():
    """Two of one name in different folders are one module to pytest: the second is not collected."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
