"""A backbone whose arrays no process holds in full: loaded from either form, and saved."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from e2p_jax.backbone.convert import convert
from e2p_jax.backbone.tensor_files import Checkpoint


def test_two_processes_save_what_they_loaded(
    tiny_backbone: Path, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    convert(tiny_backbone, tmp_path / "flax", "tiny", None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parent / "two_backbones.py"
    arguments = [str(port), "{}", str(tiny_backbone), str(tmp_path / "flax"), str(tmp_path / "out")]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *(word.format(number) for word in arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    expected = Checkpoint(tiny_backbone).tensors
    for form in (tiny_backbone.name, "flax"):
        saved = Checkpoint(tmp_path / "out" / form)
        assert saved.tensors.keys() == expected.keys()
        assert all(saved.tensors[name].tobytes() == tensor.tobytes() for name, tensor in expected.items())
