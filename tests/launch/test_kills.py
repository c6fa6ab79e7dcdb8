"""SIGKILL at random moments: the command is run again until it succeeds, and ends as if nothing had been."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
KILLED = -9


class Killable:
    """Functions in processes that can be killed."""

    def __init__(self, modules: list[str], log: Path):
        command = [sys.executable, str(Path(__file__).with_name("killable.py")), *modules]
        self._server = subprocess.Popen(command, stdin=-1, stdout=-1, text=True)
        self._log = log

    def call(
        self, module: str, function: str, *arguments: Any, change: int | None = None, seconds: float | None = None
    ) -> tuple[int, float, int]:
        """Exit code, seconds, and changes to the disk that Python made; killed before change n, or after seconds."""
        asked = {"module": module, "function": function, "arguments": arguments, "log": str(self._log)}
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write(json.dumps(asked | {"change": change, "seconds": seconds}) + "\n")
        self._server.stdin.flush()
        code, elapsed, changes = json.loads(self._server.stdout.readline())
        return code, elapsed, changes

    def said(self) -> str:
        """By the last call."""
        return self._log.read_text()

    def close(self) -> None:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture
def writer(environment: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Killable]:
    environment.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{Path(__file__).parent}")
    killable = Killable(["writing"], tmp_path / "log")
    yield killable
    killable.close()


def test_replacing_a_directory_loses_and_leaves_nothing(writer: Killable, tmp_path: Path) -> None:
    """Killed before each thing that it does to the disk: what was there is there, before or after the next call."""
    out, old, new = tmp_path / "place" / "out", {"a": b"old", "deep/b": b"old"}, {"a": b"new", "deep/b": b"new"}
    _, _, changes = writer.call("writing", "write", str(out), "old")
    assert contents(out.parent) == {f"out/{name}": data for name, data in old.items()}
    for change in range(1, changes + 6):
        writer.call("writing", "write", str(out), "old")
        if writer.call("writing", "write", str(out), "new", change=change)[0] == KILLED:
            assert writer.call("writing", "fail", str(out))[0] == 99, writer.said()
            assert contents(out) in (old, new)
            assert writer.call("writing", "write", str(out), "new")[0] == 0, writer.said()
        assert contents(out.parent) == {f"out/{name}": data for name, data in new.items()}
        assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert change > changes
