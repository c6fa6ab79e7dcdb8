"""Strictness and sizes for every test: several CPU devices, strict dtypes and ranks, a persistent compilation cache."""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

SHARED = Path(__file__).parent.parent.parent / "shared"


@pytest.fixture
def shared() -> Path:
    """The folder with real data and a real checkpoint, where a developer has one."""
    if not SHARED.is_dir():
        pytest.skip("the shared folder with real data is absent beside the repository")
    return SHARED
