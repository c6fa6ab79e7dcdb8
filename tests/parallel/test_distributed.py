"""Start-up: who this process is, that all are there, and that the end of one is the end of all."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest
from packaging.requirements import Requirement

from e2p_jax.errors import RESTART, UserError
from e2p_jax.parallel import meeting as meeting_lib
from e2p_jax.parallel import private_jax
from e2p_jax.parallel.distributed import Processes, check_same, find_place, preemption, session
from e2p_jax.parallel.meeting import Peers, Place, meet

ALL = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[3-4]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that says nothing."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI_", "TPU_", "KUBERNETES_", "JOB_", "E2P_")) or name in ALL:
            monkeypatch.delenv(name)
    return monkeypatch


def place_in(bare: pytest.MonkeyPatch, variables: dict[str, str], **flags: object) -> Place | None:
    for name, value in variables.items():
        bare.setenv(name, value)
    return find_place(Processes(**flags))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("variables", "flags", "expected"),
    [
        ({}, {}, None),
        ({}, {"coordinator": "h:9", "num_processes": 2, "process_id": 1}, Place("h:9", 2, 1, None)),
        (ALL, {}, Place("a:1", 4, 2, None)),
        (ALL, {"process_id": 3}, Place("a:1", 4, 3, None)),
        (ALL | {"JAX_LOCAL_DEVICE_IDS": "5"}, {}, Place("a:1", 4, 2, [5])),
        (SLURM, {}, Place(f"node3:{7 + 65535 - 2**12 + 1}", 16, 9, [1])),
        (SLURM | ALL, {}, Place("a:1", 4, 2, [1])),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "b:2"}, {"process_id": 0}, Place("b:2", 16, 0, [1])),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {}, None),
        (SLURM, {"num_processes": 1}, None),
        ({"SLURM_NTASKS": "1"}, {}, None),
        (OPEN_MPI, {}, Place("10.96.0.1:64888", 3, 1, [1])),
    ],
    ids=str,
)
def test_flags_before_environment_before_detection(
    bare: pytest.MonkeyPatch, variables: dict[str, str], flags: dict, expected: Place | None
) -> None:
    place = place_in(bare, variables, **flags)
    if variables is OPEN_MPI and place and expected:
        assert (place.count, place.process) == (3, 1) and place.coordinator.startswith("10.96.0.1:")
    else:
        assert place == expected


@pytest.mark.parametrize(
    ("variables", "flags", "message"),
    [
        ({}, {"num_processes": 2}, "--num-processes 2 without --coordinator, --process-id"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, {}, "--coordinator a:1 without --num-processes, --process-id"),
        (ALL, {"process_id": 4}, "--process-id 4 is not from 0 to below --num-processes 4"),
        (ALL, {"coordinator": "host"}, "--coordinator 'host' is not HOST:PORT"),
        ({"JAX_NUM_PROCESSES": "two"}, {}, "JAX_NUM_PROCESSES='two' is not a number"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, {}, "SLURM_NTASKS=2: .* start the processes with srun"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}, "OMPI_COMM_WORLD_SIZE=2: .* give all three of --coordinator"),
        ({"PMI_SIZE": "2"}, {}, "PMI_SIZE=2: "),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}, "jax sees no TPU: install requirements-tpu.txt"),
        ({"JOB_COMPLETION_INDEX": "0"}, {}, "one pod of a Kubernetes job; .* or --num-processes 1"),
        (SLURM | {"SLURM_NTASKS": "many"}, {}, "the cluster was not understood .*'many'"),
    ],
    ids=str,
)
def test_several_processes_never_become_one_silently(
    bare: pytest.MonkeyPatch, variables: dict[str, str], flags: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        place_in(bare, variables, **flags)


@pytest.fixture
def address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@contextlib.contextmanager
def meeting(*places: Place, timeout: float = 20) -> Iterator[list]:
    """`meet` of every place at the same time: peers or errors."""

    def run(place: Place) -> Peers | UserError:
        try:
            return meet(place, timeout)
        except UserError as error:
            return error

    with ThreadPoolExecutor(len(places)) as pool:
        met = list(pool.map(run, places))
    yield met
    for peers in met:
        for link in peers.links.values() if isinstance(peers, Peers) else ():
            link.close()


def test_all_meet_and_learn_the_hosts(address: str) -> None:
    with meeting(*(Place(address, 3, i, None) for i in range(3))) as met:
        host = socket.gethostname()
        assert [peers.hosts for peers in met] == [{0: host, 1: host, 2: host}] * 3
        assert [sorted(peers.links) for peers in met] == [[1, 2], [0], [0]]


def test_missing_hosts_are_named_to_all(bare: pytest.MonkeyPatch, address: str) -> None:
    bare.setenv("E2P_HOSTS", "a,b,c,d")
    with meeting(*(Place(address, 4, i, None) for i in (0, 2)), timeout=2) as met:
        for error in met:
            assert "2 of 4 processes did not come within 2 s: process 1 (host b), process 3 (host d); " in str(error)


def test_missing_first_process_is_named(address: str) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match=r"process 0 \(host 127\.0\.0\.1\) did not answer at .* raise --start-timeout"):
        meet(Place(address, 2, 1, None), 1)
    assert time.monotonic() - started < 5


def test_contradicting_processes_are_refused(address: str) -> None:
    with meeting(Place(address, 2, 0, None), Place(address, 3, 1, None)) as met:
        assert all("counts 3 processes, process 0 " in str(error) for error in met)
    with meeting(Place(address, 3, 0, None), Place(address, 3, 1, None), Place(address, 3, 1, None)) as met:
        assert "both say --process-id 1; give each its own" in str(met[0])


HELLO = {"process": 1, "count": 2, "host": "b", "proof": None}
STRANGE = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x00\xff\n",
    b"[" * 4000 + b"\n",
    b"x" * 100_000,
    b"[]\n",
    b"null\n",
    *(
        json.dumps(hello).encode() + b"\n"
        for hello in (
            {"process": 1},
            HELLO | {"count": None},
            HELLO | {"host": None},
            HELLO | {"host": ["b"]},
            HELLO | {"host": "b\x1b[2J"},
            HELLO | {"host": "b" * 300},
            HELLO | {"process": "1"},
            HELLO | {"process": True},
            HELLO | {"process": -1},
            HELLO | {"process": 2},
            HELLO | {"process": 1.5},
            HELLO | {"proof": "guessed"},
        )
    ),
]


def test_strangers_at_the_port_are_ignored_and_hold_up_nobody(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    host, _, port = address.partition(":")
    with ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as strangers:

        def knock(said: bytes) -> None:
            while True:
                with contextlib.suppress(ConnectionRefusedError):
                    stranger = strangers.enter_context(socket.create_connection((host, int(port)), timeout=5))
                    break
            with contextlib.suppress(OSError):
                stranger.sendall(said)

        first = pool.submit(meet, Place(address, 2, 0, None), 30)
        for said in STRANGE + [b""] * 20:  # the last are silent, and stay
            knock(said)
        started = time.monotonic()
        second = pool.submit(meet, Place(address, 2, 1, None), 30)
        for peers in (first.result(), second.result()):
            assert peers.hosts == dict.fromkeys(range(2), socket.gethostname())
            for link in peers.links.values():
                link.close()
        assert time.monotonic() - started < meeting_lib.HELLO_SECONDS - 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == meeting_lib.NAMED and all(line.startswith("e2p: ignored 127.0.0.1:") for line in said)


@pytest.mark.parametrize(("first", "second"), [("secret", ""), ("secret", "other"), ("", "secret")])
def test_a_process_with_another_token_is_named(
    bare: pytest.MonkeyPatch, address: str, first: str, second: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with ThreadPoolExecutor(1) as pool:
        bare.setenv("E2P_TOKEN", first)
        hosting = pool.submit(meet, Place(address, 2, 0, None), 3)
        hello = meeting_lib.Hello(1, 2, "b")
        bare.setenv("E2P_TOKEN", second)
        proof = hello.proof()
        bare.setenv("E2P_TOKEN", first)
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                link = meeting_lib.Link.over(socket.create_connection(address.split(":"), timeout=5))  # type: ignore[arg-type]
                break
        link.say(process=1, count=2, host="b", proof=proof)
        answer = link.hear(5)
        link.close()
        assert answer is not None and "another E2P_TOKEN" in answer["error"]
        assert "1 of 2 processes did not come" in str(hosting.exception())
    assert "process 1 (host b) has another E2P_TOKEN" in capsys.readouterr().err


def test_with_one_token_all_meet(bare: pytest.MonkeyPatch, address: str) -> None:
    bare.setenv("E2P_TOKEN", "secret")
    with meeting(*(Place(address, 3, i, None) for i in range(3))) as met:
        assert all(len(peers.hosts) == 3 for peers in met)


def test_only_the_coordinators_address_listens(address: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        hosting = pool.submit(meet, Place(address, 2, 0, None), 2)
        time.sleep(0.5)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", int(address.split(":")[1])), timeout=5)
        assert hosting.exception() is not None


def test_taken_port_is_refused() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(UserError, match=r"is taken here .* choose another"),
    ):
        meet(Place(f"127.0.0.1:{server.getsockname()[1]}", 2, 0, None), 5)


def test_alone_nothing_is_joined() -> None:
    with session(Processes()):
        check_same("data", lambda: pytest.fail("computed for nobody"))


PROGRAM = """
import os, signal, sys, time
import numpy as np
from e2p_jax.errors import RESTART, UserError
from e2p_jax.parallel.distributed import Processes, check_same, session
who, what = int(sys.argv[2]), sys.argv[3]
with session(Processes(sys.argv[1], 2, who, 60)):
    if what == "agree":
        check_same("data", lambda: bytes(32))
    elif what == "differ":
        check_same("data", lambda: bytes([who]) * 32)
    elif who == 0:
        time.sleep(120)
    elif what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "error":
        raise UserError("no such file here")
    elif what == "crash":
        raise ZeroDivisionError("a bug")
"""


@pytest.mark.parametrize(
    ("what", "codes", "message"),
    [
        ("agree", [0, 0], ""),
        ("differ", [1, 1], "process 1 (host {}) has other data than process 0"),
        ("killed", [RESTART, -signal.SIGKILL], "e2p: lost process 1 (host {}): it was killed"),
        ("error", [1, 1], "e2p: process 1 (host {}): no such file here"),
        ("crash", [1, 1], "e2p: process 1 (host {}) failed: ZeroDivisionError: a bug"),
    ],
)
def test_the_end_of_one_is_the_end_of_all(address: str, what: str, codes: list[int], message: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    commands = [[sys.executable, "-c", PROGRAM, address, str(i), what] for i in range(2)]
    with contextlib.ExitStack() as stack:
        processes = [subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True) for c in commands]
        for process in processes:
            stack.enter_context(process)
            stack.callback(process.kill)  # one that hangs fails this test alone
        said = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == codes, said
    assert message.format(socket.gethostname()) in said[0]


def test_sigterm_is_noted_inside_of_preemption_only() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with preemption(0) as stop_here:
        assert not stop_here(1)
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 10  # another thread may be the one that gets it
        while not stop_here(2) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stop_here(2)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_jax_that_has_moved_its_private_parts_is_named(bare: pytest.MonkeyPatch) -> None:
    """By the version, in a line; a single process does not need them."""
    bare.delattr("jax._src.clusters.ClusterEnv.auto_detect_unset_distributed_params")
    with pytest.raises(UserError, match=rf"^jax {jax.__version__}: .*pip install 'jax>=0.8,<0.12'"):
        find_place(Processes())
    assert find_place(Processes(num_processes=1)) is None
    bare.delattr("jax._src.distributed.global_state")
    with pytest.raises(UserError, match=r"pip install 'jax>=0.8,<0.12'"):
        private_jax.start_preemption_service()


def test_private_parts_of_jax_are_asked_for_in_one_place_and_of_known_versions_alone() -> None:
    root = Path(private_jax.__file__).parents[2]
    private = re.compile(r"^\s*(from|import) jax\._", re.MULTILINE)
    users = [path.name for path in (root / "e2p_jax").rglob("*.py") if private.search(path.read_text())]
    assert users == ["private_jax.py"]
    stated = re.findall(r'"(jax(?:\[\w+\])?[<>=][^"]*)"', (root / "pyproject.toml").read_text())
    assert len(stated) == 4
    for requirement in map(Requirement, stated):
        for version, admitted in [("0.10.2", True), ("0.11.0", True), ("0.11.2", True), ("0.12.0", False)]:
            assert requirement.specifier.contains(version) == admitted, requirement
