"""Processes: which of how many this one is, that all of them are there, and that the loss of one ends all.

Flags come before the environment, the environment before what jax detects (Slurm, Open MPI, TPU on GKE and GCE,
Kubernetes), and only where none of them speaks is there a single process.

Before jax connects, the processes meet at the coordinator's port. jax ends a process that waits for another in vain
by an abort without names; here process 0 knows who is missing. The connections stay open: a process that dies, or
whose machine is no longer reached for `LOST_SECONDS`, is named by all others, and they end with `RESTART`.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, NoReturn

import jax
import numpy as np
from jax._src import clusters
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils

from e2p_jax.errors import RESTART, Preempted, UserError
from e2p_jax.options import Processes

LOST_SECONDS = 30
_RETRY_SECONDS = 0.2
_SETTLE_SECONDS = 5  # a peer's death shows as an error of a collective before its connection is seen to close

# Launchers whose processes say how many they are; jax must have detected them where there are several.
_SIZES = {
    "SLURM_NTASKS": "a Slurm allocation; start the processes with srun",
    "OMPI_COMM_WORLD_SIZE": "an Open MPI job whose version jax does not know",
    "PMI_SIZE": "an MPI job that jax does not know",
}


@dataclasses.dataclass(frozen=True)
class Place:
    """A process among several."""

    coordinator: str
    count: int
    process: int
    device_ids: Sequence[int] | None  # of this host's GPUs; None is all


def find_place(given: Processes) -> Place | None:
    """Flags > environment > detection; None is a single process.

    Raises:
      UserError: a part of the three is missing, or the environment is that of several processes that nothing tells
        apart.
    """
    coordinator = given.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count = _number("JAX_NUM_PROCESSES") if given.num_processes is None else given.num_processes
    process = _number("JAX_PROCESS_ID") if given.process_id is None else given.process_id
    device_ids: Sequence[int] | None = [
        int(i) for i in os.environ.get("JAX_LOCAL_DEVICE_IDS", "").split(",") if i
    ] or None
    if count == 1:
        return None
    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, count, process, device_ids, None, given.start_timeout
        )
    except Exception as error:  # metadata servers, Kubernetes and address parsing each raise their own
        raise UserError(f"the cluster was not understood ({error}); {_HOW}") from error
    coordinator, count, process, device_ids = found
    if coordinator is None and count is None and process is None:
        _refuse_undetected()
        return None
    if coordinator is None or count is None or process is None:
        values = {"--coordinator": coordinator, "--num-processes": count, "--process-id": process}
        known = ", ".join(f"{flag} {value}" for flag, value in values.items() if value is not None)
        missing = ", ".join(flag for flag, value in values.items() if value is None)
        raise UserError(f"{known} without {missing}; {_HOW}")
    if count == 1:
        return None
    if not 0 <= process < count:
        raise UserError(f"--process-id {process} is not from 0 to below --num-processes {count}")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator {coordinator!r} is not HOST:PORT")
    return Place(coordinator, count, process, device_ids)


_HOW = (
    "give all three of --coordinator, --num-processes and --process-id (or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES "
    "and JAX_PROCESS_ID), or --num-processes 1"
)


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is not None and not text.isdigit():
        raise UserError(f"{variable}={text!r} is not a number")
    return None if text is None else int(text)


def _refuse_undetected() -> None:
    for variable, what in _SIZES.items():
        if (_number(variable) or 1) > 1:
            raise UserError(f"{variable}={os.environ[variable]}: this is {what}; or {_HOW}")
    if "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        raise UserError("TPU_WORKER_HOSTNAMES names several hosts, but jax sees no TPU: install requirements-tpu.txt")
    if "JOB_COMPLETION_INDEX" in os.environ:
        raise UserError(f"JOB_COMPLETION_INDEX: this is one pod of a Kubernetes job; {_HOW}")


def _name(process: int, hosts: dict[int, str]) -> str:
    """`process 1 (host b)`, by what it said itself, or else by what the launcher knows."""
    listed = (os.environ.get("E2P_HOSTS") or os.environ.get("TPU_WORKER_HOSTNAMES") or "").split(",")
    host = hosts.get(process) or (listed[process] if process < len(listed) else "")
    return f"process {process} (host {host})" if host else f"process {process}"


@dataclasses.dataclass
class _Link:
    """One open connection; lines of JSON go over it."""

    connection: socket.socket
    file: IO[str]

    @classmethod
    def over(cls, connection: socket.socket) -> "_Link":
        for option, value in (
            ("TCP_KEEPIDLE", LOST_SECONDS // 3),
            ("TCP_KEEPINTVL", LOST_SECONDS // 6),
            ("TCP_KEEPCNT", 4),
            ("TCP_USER_TIMEOUT", 1000 * LOST_SECONDS),
        ):
            if hasattr(socket, option):  # Linux has all of them
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return cls(connection, connection.makefile("r", encoding="utf-8"))

    def say(self, **values: Any) -> None:
        with contextlib.suppress(OSError):  # who is gone needs no news
            self.connection.sendall(json.dumps(values).encode() + b"\n")

    def hear(self, timeout: float | None = None) -> dict[str, Any] | None:
        """The next line; None at the end of the connection, after `timeout`, or for what is no line of ours."""
        self.connection.settimeout(timeout)
        try:
            heard = json.loads(self.file.readline(100_000))
        except (OSError, ValueError):
            return None
        return heard if isinstance(heard, dict) else None

    def close(self) -> None:
        self.file.close()
        self.connection.close()


@dataclasses.dataclass
class Peers:
    """The processes of a run and the connections between process 0 and the others."""

    process: int
    hosts: dict[int, str]
    links: dict[int, _Link]

    def watch(self) -> None:
        """From now on, what ends another process out of order ends this one."""
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer, link in self.links.items():
                selector.register(link.connection, selectors.EVENT_READ, peer)
            while selector.get_map():
                for key, _ in selector.select():
                    heard = self.links[key.data].hear()
                    if heard is None:
                        lost = _name(key.data, self.hosts)
                        self.end(RESTART, f"lost {lost}: it was killed, or its machine is not reached any more")
                    if "code" in heard:
                        self.end(heard["code"], heard["message"])
                    selector.unregister(key.fileobj)  # it has left in order

    def leave(self) -> None:
        """Says that this process ends in order."""
        for link in self.links.values():
            link.say(left=True)

    def end(self, code: int, message: str) -> NoReturn:
        """Ends this process and, through process 0, all others; whatever a thread may wait for."""
        print(f"e2p: {message}", file=sys.stderr, flush=True)
        for link in self.links.values():
            link.say(code=code, message=message)
        sys.stdout.flush()
        os._exit(code)


def meet(place: Place, timeout: float) -> Peers:
    """Waits until every process has come to the coordinator's port.

    Raises:
      UserError: naming the processes, and where they are known the hosts, that did not come within `timeout` seconds;
        or two processes with one id, or with different counts.
    """
    return _host(place, timeout) if place.process == 0 else _join(place, timeout)


def _host(place: Place, timeout: float) -> Peers:
    port = int(place.coordinator.rpartition(":")[2])
    try:
        dual = socket.has_dualstack_ipv6()
        server = socket.create_server(
            ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=place.count
        )
    except OSError as error:
        raise UserError(
            f"--coordinator {place.coordinator}: port {port} is taken here ({error}); choose another"
        ) from error
    peers = Peers(0, {0: socket.gethostname()}, {})
    deadline = time.monotonic() + timeout

    def refuse(message: str, *more: _Link) -> NoReturn:
        for link in (*peers.links.values(), *more):
            link.say(error=message)
            link.close()
        raise UserError(message)

    with server:
        while len(peers.hosts) < place.count:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = [_name(p, {}) for p in range(place.count) if p not in peers.hosts]
                refuse(
                    f"{len(missing)} of {place.count} processes did not come within {timeout:g} s: "
                    f"{', '.join(missing)}; see their logs, check that they reach "
                    f"{place.coordinator}, or raise --start-timeout"
                )
            link = _Link.over(connection)
            hello = link.hear(5)
            if hello is None or "process" not in hello:
                link.close()  # not one of ours
                continue
            process, host = hello["process"], hello["host"]
            if hello["count"] != place.count:
                refuse(
                    f"process {process} (host {host}) counts {hello['count']} processes, process 0 (host "
                    f"{peers.hosts[0]}) counts {place.count}; start all with one --num-processes",
                    link,
                )
            if process in peers.hosts:
                refuse(
                    f"hosts {peers.hosts[process]} and {host} both say --process-id {process}; give each its own", link
                )
            peers.hosts[process], peers.links[process] = host, link
    for link in peers.links.values():
        link.say(hosts=peers.hosts)
    return peers


def _join(place: Place, timeout: float) -> Peers:
    host, _, port = place.coordinator.rpartition(":")
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=5)
        except OSError:
            time.sleep(_RETRY_SECONDS)
            continue
        link = _Link.over(connection)
        link.say(process=place.process, count=place.count, host=socket.gethostname())
        answer = link.hear(timeout + 10)
        if answer is None:  # an earlier run that has not yet ended, or a process 0 that has
            link.close()
            time.sleep(_RETRY_SECONDS)
            continue
        if "error" in answer:
            link.close()
            raise UserError(answer["error"])
        return Peers(place.process, {int(p): h for p, h in answer["hosts"].items()}, {0: link})
    raise UserError(
        f"{_name(0, {0: host})} did not answer at {place.coordinator} within {timeout:g} s; see its log, check that "
        "its port is reached from here, or raise --start-timeout"
    )


_peers: Peers | None = None  # of this process, inside a session of several


@contextlib.contextmanager
def session(given: Processes) -> Iterator[None]:
    """Joins the other processes, if there are any, for the time of a command.

    With several, an error does not leave the block: it is printed, sent to the others, and ends them all with one
    exit code, so that nobody waits for a process that has failed.

    Raises:
      UserError: the processes do not come together.
    """
    global _peers
    place = find_place(given)
    if place is None:
        yield
        return
    peers = meet(place, given.start_timeout)
    # Its handler of SIGTERM starts with `preemption`; until then nothing is lost by ending at once.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        place.coordinator, place.count, place.process, place.device_ids, initialization_timeout=given.start_timeout
    )
    peers.watch()
    _peers = peers
    try:
        yield
    except Preempted:
        peers.leave()
        raise
    except UserError as error:
        peers.end(1, f"{_name(peers.process, peers.hosts)}: {error}")
    except BaseException as error:
        traceback.print_exc()
        time.sleep(_SETTLE_SECONDS)
        peers.end(1, f"{_name(peers.process, peers.hosts)} failed: {type(error).__name__}: {error}")
    peers.leave()


def end_all(message: str) -> NoReturn:
    """Ends all processes with an error, from a thread that finds that this one must not go on."""
    (_peers or Peers(0, {}, {})).end(1, message)


def hosts() -> str:
    """`2 processes on a, b`."""
    names = sorted(set(_peers.hosts.values())) if _peers else [socket.gethostname()]
    return f"{jax.process_count()} process(es) on {', '.join(names)}"


def is_first() -> bool:
    """Whether this process writes the files that stand for the whole run."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process has come here; at once where there is one."""
    multihost_utils.sync_global_devices(name)


def gather(values: np.ndarray) -> np.ndarray:
    """[processes, ...]: the values of every process, which all have come here."""
    return values[None] if _peers is None else np.asarray(multihost_utils.process_allgather(values))


def check_same(what: str, digest: Callable[[], bytes]) -> None:
    """Holds the SHA-256 of what every process has read against that of process 0.

    Raises:
      UserError: naming a process that has read something else.
    """
    if _peers is None:
        return
    everywhere = gather(np.frombuffer(digest(), np.uint32))
    for process, other in enumerate(everywhere):
        if not np.array_equal(other, everywhere[0]):
            where = _name(process, _peers.hosts)
            raise UserError(f"{where} has other {what} than process 0; give every host the same files and flags")


@contextlib.contextmanager
def preemption(step: int) -> Iterator[Callable[[int], bool]]:
    """From here on SIGTERM asks for an orderly stop; before and after, it ends the process.

    Yields a function that is called once after every step, counted on from `step`, and says whether to save and stop
    there: on every process at the same step, whichever was told.
    """
    if jax.process_count() > 1:
        jax.config.update("jax_enable_preemption_service", True)
        if jax_distributed.global_state.preemption_sync_manager is None:
            jax_distributed.global_state.initialize_preemption_sync_manager()
        # The processes agree on the step after the highest that any has reached: they must know where they start.
        multihost_utils.reached_preemption_sync_point(step)
        try:
            yield multihost_utils.reached_preemption_sync_point
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return
    told = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield lambda _: told.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
