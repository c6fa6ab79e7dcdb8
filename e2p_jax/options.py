"""Options of commands beside a config. Light: the command line reads it before anything heavy is imported."""

import dataclasses
from typing import Literal

from e2p_jax.config_fields import LARGEST_FLOAT
from e2p_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Processes:
    """Which process of how many this is; what is not given comes from the environment, or is detected."""

    coordinator: str | None = None
    """HOST:PORT on process 0 (JAX_COORDINATOR_ADDRESS)."""
    num_processes: int | None = None
    """All processes of the run, on all hosts (JAX_NUM_PROCESSES)."""
    process_id: int | None = None
    """This one, from 0 (JAX_PROCESS_ID)."""
    start_timeout: int = 300
    """Seconds to wait for the others."""

    def __post_init__(self) -> None:
        """Raises UsageError for values without a meaning; find_place checks the rest when all sources are known."""
        if (
            self.num_processes == 0
            or min(self.num_processes or 1, self.start_timeout) < 1
            or (self.process_id or 0) < 0
        ):
            raise UsageError("--num-processes and --start-timeout must be positive, and --process-id not negative")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 64
    """Upper bound of a reply's length."""
    temperature: float = 0.0
    """0 takes the most likely token; higher is more varied."""
    top_k: int = 0
    """Only the k most likely tokens; 0 is all."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability (Holtzman et al., arXiv 1904.09751)."""
    seed: int = 0
    """Of the draws; the same seed gives the same answers."""

    def __post_init__(self) -> None:
        """Raises UsageError for values without a meaning."""
        if not 0 < self.max_new_tokens < 2**31:
            raise UsageError("--max-new-tokens must be positive")
        if not 0 <= self.temperature <= LARGEST_FLOAT or not 0 <= self.top_k < 2**31 or not 0 < self.top_p <= 1:
            raise UsageError(
                "--temperature and --top-k must not be negative or infinite, and --top-p must be in (0, 1]"
            )
        if not 0 <= self.seed < 2**32:
            raise UsageError("--seed must be a whole number from 0 to below 2^32")


@dataclasses.dataclass(frozen=True)
class EncoderSettings:
    """What some encoders need."""

    backbone: str = "embedded"
    """With backbone: a Hugging Face model directory, a GGUF file, a hub id, or `embedded`."""
    layer: int = -1
    """With backbone: after how many layers the hidden states are taken; negative counts from the last."""
    ignored_keys: tuple[str, ...] = ()
    """With backbone: unknown keys of config.json that change nothing, as backbone.ignored_keys."""
    blocks: int = 1
    """With a text encoder or backbone: so many vectors a user side by side, each of a part of the context's texts, for
    projector.kind blocks."""
    items: str | None = None
    """With item-mean: table of item vectors, by item id for interactions, else by the texts of the contexts."""
    width: int = 64
    """With als and svd: of a vector."""
    seed: int = 0
    """With als and svd: where the iteration begins."""
    dtype: Literal["auto", "float32", "float16"] = "auto"
    """Of the written vectors; auto: with import as they are, else float32."""

    def __post_init__(self) -> None:
        """Raises UsageError for values without a meaning."""
        if min(self.width, self.blocks) < 1 or self.width >= 2**31 or not 0 <= self.seed < 2**32:
            raise UsageError("--width and --blocks must be positive, and --seed a whole number from 0 to below 2^32")
