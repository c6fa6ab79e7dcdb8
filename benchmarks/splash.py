"""What splash attention's block sizes cost, compiled for a TPU that is not here: one line a choice.

    python benchmarks/splash.py --topology v5e:2x2 --heads 32 --groups 8 --width 64

Needs `jax[tpu]`. libtpu states no time of a kernel. What it does state: whether the blocks fit into the core's memory,
and what the backward pass sets aside. Beside it stands what the grid says: how many times a pair of blocks is worked
out, and the bytes that its blocks bring in, forward and backward.
"""

import os
from typing import Any

import tyro

SIZES = (128, 256, 512, 1024, 2048)


def main(topology: str, heads: int = 32, groups: int = 8, width: int = 64, length: int = 2048) -> None:
    """Compiles one layer's attention of one row, forward and backward.

    Args:
      topology: as `e2p plan` takes it.
      heads: H, of queries.
      groups: G, of keys and values.
      width: C.
      length: T, one causal segment.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp

    from e2p_jax.backbone import kernels
    from e2p_jax.plan.topology import find_topology

    here = jax.sharding.SingleDeviceSharding(find_topology(topology).devices[0])

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    q, kv = array(1, length, heads, width), array(1, length, groups, width)
    for fused in (False, True):
        for size in (size for size in SIZES if length % size == 0):
            kernels.SPLASH_BLOCKS, kernels.SPLASH_FUSED = (size,), fused

            def loss(q: Any, k: Any, v: Any, segments: Any) -> Any:
                out = kernels.splash_attention(q, k, v, segments, 0, (0,), scale=width**-0.5)
                return jnp.sum(out.astype(jnp.float32) ** 2)

            inputs = q, kv, kv, array(1, length, dtype=jnp.int32)
            try:
                memory = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*inputs).compile().memory_analysis()
                said = f"{memory.temp_size_in_bytes / 2**20:.1f} MiB temporary"
            except jax.errors.JaxRuntimeError as error:
                said = f"refused: {str(error).splitlines()[0][:80]}"
            count = length // size
            pairs = count * (count + 1) // 2
            lanes = -(-width // 128) * 128
            passes = 2 if fused else 3  # grids gone through: forward, and one or two backward
            nbytes = 2 * 2 * size * lanes * pairs * heads * passes
            print(f"{topology} C={width} blocks of {size}, backward {'fused' if fused else 'in two'}: {said}, "
                  f"{pairs * heads * passes} block pairs, {nbytes / 2**20:.0f} MiB of blocks")  # fmt: skip


if __name__ == "__main__":
    tyro.cli(main)
