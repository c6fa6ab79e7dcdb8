"""Processes: which of how many this one is, that all of them are there, and that the loss of one ends all.

Flags come before the environment, the environment before what jax detects (Slurm, Open MPI, TPU on GKE and GCE,
Kubernetes), and only where none of them speaks is there a single process.

Before jax connects, the processes meet at the coordinator's port (meeting.py).
"""

import contextlib
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from e2p_jax.errors import Preempted, UserError
from e2p_jax.options import Processes
from e2p_jax.parallel import private_jax
from e2p_jax.parallel.meeting import Peers, Place, loopback, meet, name_of

_SETTLE_SECONDS = 5  # a peer's death shows as an error of a collective before its connection is seen to close

# Launchers whose processes say how many they are; jax must have detected them where there are several.
_SIZES = {
    "SLURM_NTASKS": "a Slurm allocation; start the processes with srun",
    "OMPI_COMM_WORLD_SIZE": "an Open MPI job whose version jax does not know",
    "PMI_SIZE": "an MPI job that jax does not know",
}


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
        found = private_jax.detect_cluster(coordinator, count, process, device_ids, given.start_timeout)
    except UserError:
        raise
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
        place.coordinator,
        place.count,
        place.process,
        place.device_ids,
        initialization_timeout=given.start_timeout,
        coordinator_bind_address=place.coordinator if loopback(place.coordinator) else None,
    )
    peers.watch()
    _peers = peers
    try:
        yield
    except Preempted:
        private_jax.keep_clients()
        peers.leave()
        raise
    except (UserError, OSError) as error:
        peers.end(1, f"{name_of(peers.process, peers.hosts)}: {error}")
    except BaseException as error:
        traceback.print_exc()
        time.sleep(_SETTLE_SECONDS)
        peers.end(1, f"{name_of(peers.process, peers.hosts)} failed: {type(error).__name__}: {error}")
    private_jax.keep_clients()
    peers.leave()


def end_all(message: str) -> NoReturn:
    """Ends all processes with an error, from a thread that finds that this one must not go on."""
    (_peers or Peers(0, {}, {})).end(1, message)


def hosts() -> str:
    """`2 processes on a, b`."""
    names = sorted(set(_peers.hosts.values())) if _peers else [socket.gethostname()]
    return f"{jax.process_count()} process(es) on {', '.join(names)}"


def is_first() -> bool:
    """Tells whether this process writes the files that stand for the whole run."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process has come here; at once where there is one."""
    multihost_utils.sync_global_devices(name)


def gather(values: np.ndarray) -> np.ndarray:
    """[processes, ...]: the values of every process, which all have come here."""
    return values[None] if _peers is None else np.asarray(multihost_utils.process_allgather(values))


def of_first(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The values of process 0; all have come here, with arrays of the same shapes and dtypes."""
    return values if _peers is None else jax.device_get(multihost_utils.broadcast_one_to_all(values))


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
            where = name_of(process, _peers.hosts)
            raise UserError(f"{where} has other {what} than process 0; give every host the same files and flags")


@contextlib.contextmanager
def preemption(step: int) -> Iterator[Callable[[int], bool]]:
    """From here on SIGTERM asks for an orderly stop; before and after, it ends the process.

    Yields a function that is called once after every step, counted on from `step`, and says whether to save and stop
    there: on every process at the same step, whichever was told.
    """
    if jax.process_count() > 1:
        jax.config.update("jax_enable_preemption_service", True)
        private_jax.start_preemption_service()
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
