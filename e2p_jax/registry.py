"""Lists what flags and config fields choose by name. To add one, write its file, its line here and its test.

A line names the place and says what is there; nothing is imported before it is chosen, for `e2p --help` is quick.
The rows of `e2p compare` have their table in `baselines.py`.
"""

import dataclasses
import inspect
import pkgutil
from collections.abc import Collection, Mapping
from typing import Any, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Choice:
    """Something with a name."""

    place: str
    """`module`, or `module:attribute`."""
    what: str
    """One line, which --help shows."""

    def load(self) -> Any:
        """Imports it."""
        return pkgutil.resolve_name(self.place)

    def of(self, flags: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a command's flags that it has a parameter for."""
        return {name: value for name, value in flags.items() if name in inspect.signature(self.load()).parameters}


@dataclasses.dataclass(frozen=True)
class Export(Choice):
    """A format of `e2p export`: a function of a run and of those flags that it has a parameter for.

    One with a parameter `out` writes it. Another returns values: lines of JSON in --out, or on stdout.
    """

    backbone: Literal["none", "embedding", "all"] = "none"
    """How much of the LLM it reads; see `open_run`."""


# Modules that define what `prefix/projector.py` calls a Kind.
PROJECTORS = {
    "mlp": Choice("e2p_jax.prefix.mlp", "two layers with SiLU beside a linear skip"),
    "linear": Choice("e2p_jax.prefix.linear", "one matrix"),
}
# Classes derived from `datasets/builder.py`'s RecordBuilder.
DATASETS = {
    "persona_chat": Choice(
        "e2p_jax.datasets.persona_chat.persona_chat_dataset_builder:Builder", "dialogues of people with a persona"
    ),
    "pens": Choice("e2p_jax.datasets.pens.pens_dataset_builder:Builder", "headlines rewritten for their readers"),
    "interactions": Choice(
        "e2p_jax.datasets.interactions.interactions_dataset_builder:Builder",
        "who consumed what: films, music, podcasts",
    ),
}
# Functions of `data.path` and of those flags of `e2p embed` that they have a parameter for: ids of all users, and
# vectors [U, E], NaN for users who have none.
ENCODERS = {
    "backbone": Choice("e2p_jax.embed.hidden_states:embed", "mean hidden state of a frozen backbone over the context"),
    "als": Choice("e2p_jax.embed.collaborative:factors", "factors of who consumed what, of prepared interactions"),
    "svd": Choice("e2p_jax.embed.collaborative:factors", "the same by singular values"),
    "item-mean": Choice(
        "e2p_jax.embed.collaborative:item_means", "mean of the vectors of the items in the context or history"
    ),
    "import": Choice("e2p_jax.embed.make:imported", "the vectors that are in the file"),
}
TEXT_ENCODER = Choice("e2p_jax.embed.text:embed", "directory or hub id of a text encoder")  # any other name
_ENGINES = "e2p_jax.export.engines:export_engine"
EXPORTS = {
    "transformers": Export(
        "e2p_jax.export.transformers:export_transformers", "a model directory for AutoModelForCausalLM"
    ),
    "peft": Export("e2p_jax.export.peft:export_peft", "a prompt-tuning adapter per user"),
    "vllm": Export(_ENGINES, "a line of JSON per user, the body of a request to /v1/completions", "embedding"),
    "vllm-chat": Export(_ENGINES, "the same for /v1/chat/completions", "embedding"),
    "sglang": Export(_ENGINES, "the same for /generate", "embedding"),
    "backbone": Export(
        "e2p_jax.export.weights:export_backbone",
        "a model directory of the backbone alone, for a run that trained it",
        "all",
    ),
}


def described(table: Mapping[str, Choice]) -> str:
    """`name: what; name: what.`"""
    return "; ".join(f"{name}: {choice.what}" for name, choice in table.items()) + "."


def one_of(names: Collection[str], help: str | None = None) -> Any:
    """Makes `Annotated[str, ...]` a choice of names: of those that there are when a value is parsed or checked."""

    def choice() -> Any:
        return Literal[tuple(names)]

    return tyro.conf.arg(
        constructor_factory=choice,
        help=help,
        help_behavior_hint=lambda default: f"(default: {default.strip('''[']''')})",
    )
