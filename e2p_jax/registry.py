"""Lists what flags and config fields choose by name. To add one, write its file, its line here and its test.

A line names the place and says what is there; nothing is imported before it is chosen, for `e2p --help` is quick.
The rows of `e2p compare` have their table in `baselines.py`.
"""

import pkgutil
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import tyro


class Choice(NamedTuple):
    """Something with a name."""

    place: str  # `module`, or `module:attribute`
    what: str  # one line, which --help shows

    def load(self) -> Any:
        """Imports it."""
        return pkgutil.resolve_name(self.place)


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
# Functions of a run and of those flags of `e2p export` that they have a parameter for. One that takes `out` writes it;
# another returns values, each of which becomes a line of JSON in --out, or on stdout.
_ENGINES = "e2p_jax.export.engines:export_engine"
EXPORTS = {
    "transformers": Choice(
        "e2p_jax.export.transformers:export_transformers", "a model directory for AutoModelForCausalLM"
    ),
    "peft": Choice("e2p_jax.export.peft:export_peft", "a prompt-tuning adapter a user"),
    "vllm": Choice(_ENGINES, "a line of JSON a user, the body of a request to /v1/completions"),
    "vllm-chat": Choice(_ENGINES, "the same for /v1/chat/completions"),
    "sglang": Choice(_ENGINES, "the same for /generate"),
    "backbone": Choice(
        "e2p_jax.export.backbone:export_backbone", "a model directory of the backbone alone, for a run that trained it"
    ),
}


def described(table: dict[str, Choice]) -> str:
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
