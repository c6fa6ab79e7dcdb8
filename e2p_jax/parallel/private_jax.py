"""Does what jax has no public way to: all imports of `jax._src`, for the versions that pyproject.toml admits.

Public alternatives do not fit. `jax.distributed.initialize` finds the cluster as well, but only while it connects, and
processes meet before; and it starts the preemption service, whose handler of SIGTERM must not be there before training.
"""

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

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


def keep_clients() -> None:
    """Leaves what jax holds of devices to the system at the end of this process, in place of the interpreter.

    The pool of threads that a CPU's collectives ran in misses the word to end now and then, and whoever destroys it
    waits for ever (jaxlib 0.11.2: 6 of some 200 pairs of processes on a busy machine, none of 294 with this).

    Raises:
      UserError: this version of jax has it elsewhere.
    """
    with _admitted("start a single process"):
        from jax._src.xla_bridge import _backends
    for client in _backends.values():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(client))


def cudnn_primitives() -> tuple[Any, Any, dict[str, Any]]:
    """CuDNN's attention, forward and backward, and what every call of a packed layout hands them.

    `jax.nn.dot_product_attention` has no packed layout, and the function behind it asks the card that it runs on what
    it can do, where a program may be compiled for one that is not there, and scaled the offsets of keys and values by
    the number of queries' heads before 0.11.2 (jax-ml/jax#39521).

    Raises:
      UserError: this version of jax has it elsewhere.
    """
    with _admitted("set backbone.attention to xla"):
        from jax._src.cudnn import fused_attention_stablehlo as cudnn

        forward, backward = cudnn._dot_product_attention_fwd_p, cudnn._dot_product_attention_bwd_p
        mask, layout = cudnn.MaskType.PADDING_CAUSAL, cudnn.AttentionLayout.BTNH.value
    common = {"seed": 0, "dropout_rate": 0.0, "variadic_args": (False, False), "mask_type": mask, "layout": layout}
    return forward, backward, common


@contextlib.contextmanager
def _admitted(otherwise: str) -> Iterator[None]:
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"jax {jax.__version__}: not a version whose inner parts are known here ({error}); "
            f"pip install 'jax>=0.8,<0.12', or {otherwise}"
        ) from error
