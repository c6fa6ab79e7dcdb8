"""The adapter of kind `none`: nothing beside the backbone's matrices."""

from e2p_jax.config import AdapterConfig as Settings

__all__ = ["Settings"]
