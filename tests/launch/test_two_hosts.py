"""Two network namespaces joined by a cable are two hosts; when it is cut, both sides end and name the other."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2p_jax.errors import RESTART

LOST_SECONDS = 6  # five times as soon as users' processes
PROGRAM = f"""
import sys, time
from e2p_jax.parallel import meeting
from e2p_jax.parallel.distributed import Processes, session
meeting.LOST_SECONDS = {LOST_SECONDS}
with session(Processes("10.99.0.1:5555", 2, int(sys.argv[1]), 120)):
    print("met", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two namespaces, 10.99.0.1 and 10.99.0.2."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"e2p{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            if subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True).returncode:
                pytest.skip("this machine does not allow network namespaces")
        first, second = names
        subprocess.run(f"ip link add cable netns {first} type veth peer name cable netns {second}".split(), check=True)
        for number, name in enumerate(names, 1):
            for words in (f"addr add 10.99.0.{number}/24 dev cable", "link set cable up", "link set lo up"):
                subprocess.run(["ip", "-n", name, *words.split()], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_a_cut_cable_ends_both_sides(hosts: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    python = [sys.executable, "-c", PROGRAM]
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *python, str(number)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, name in enumerate(hosts)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "met\n"
    cut = time.monotonic()
    subprocess.run(["ip", "-n", hosts[0], "link", "set", "cable", "down"], check=True)
    said = [process.communicate(timeout=LOST_SECONDS + 60)[1] for process in processes]
    assert time.monotonic() - cut < LOST_SECONDS + 10
    assert [process.returncode for process in processes] == [RESTART, RESTART]
    assert "e2p: lost process 1 (host " in said[0] and "e2p: lost process 0 (host " in said[1]
