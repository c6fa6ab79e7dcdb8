"""Does what jax has no public way to: all imports of `jax._src`, for the versions that pyproject.toml admits.

Public alternatives do not fit. `jax.distributed.initialize` finds the cluster as well, but only while it connects, and
processes meet before; and it starts the preemption service, whose handler of SIGTERM must not be there before training.
"""

import contextlib
from collections.abc import Iterator, Sequence

import jax

from e2p_jax.errors import UserError


def detect_cluster(
    coordinator: str | None, count: int | None, process: int | None, device_ids: Sequence[int] | None, timeout: int
) -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
    """The first four with what jax detects in place of None, as far as it does.

    Raises:
      UserError: this version of jax has it elsewhere.
    """
    with _admitted("give --num-processes 1 for a single one"):
        from jax._src.clusters import ClusterEnv

        find = ClusterEnv.auto_detect_unset_distributed_params
    return find(coordinator, count, process, device_ids, None, timeout)


def start_preemption_service() -> None:
    """Starts it as `jax.distributed.initialize` with `jax_enable_preemption_service` does; once processes are joined.

    Raises:
      UserError: this version of jax has it elsewhere.
    """
    with _admitted("start a single process"):
        from jax._src.distributed import global_state

        running, start = global_state.preemption_sync_manager, global_state.initialize_preemption_sync_manager
    if running is None:
        start()


@contextlib.contextmanager
def _admitted(otherwise: str) -> Iterator[None]:
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"jax {jax.__version__}: not a version whose way to join processes is known here ({error}); "
            f"pip install 'jax>=0.8,<0.12', or {otherwise}"
        ) from error
