"""Lists what flags and config fields choose by name. To add one, write its file, its line here and its test.

A line names the place and says what is there; nothing is imported before it is chosen, for `e2p --help` is quick.
The rows of `e2p compare` have their table in `baselines.py`. A plugin is a module that adds lines when it is imported;
docs/library.md says how.
"""

import dataclasses
import functools
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import tyro

from e2p_jax.errors import UserError


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
    items: bool = False
    """Whether it holds the head over items."""


# Modules that define what `prefix/projector.py` calls a Kind.
PROJECTORS = {
    "mlp": Choice("e2p_jax.prefix.mlp", "two layers with SiLU beside a linear skip"),
    "linear": Choice("e2p_jax.prefix.linear", "one matrix"),
    "blocks": Choice("e2p_jax.prefix.blocks", "a soft token from each of K vectors side by side, by one mlp"),
}
# Modules that define what `backbone/adapter.py` calls a Kind.
ADAPTERS = {
    "none": Choice("e2p_jax.backbone.no_adapter", "nothing"),
    "lora": Choice("e2p_jax.backbone.lora", "low-rank matrices beside every matrix of the layers"),
}
# Sections of a config that have a kind, whose module has the section's class: `Settings`.
KINDS = {"projector": PROJECTORS, "adapter": ADAPTERS}
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
        "e2p_jax.export.transformers:export_transformers", "a model directory for AutoModelForCausalLM", items=True
    ),
    "peft": Export("e2p_jax.export.peft:export_peft", "a prompt-tuning adapter per user", "embedding"),
    "vllm": Export(_ENGINES, "a line of JSON per user, the body of a request to /v1/completions", "embedding"),
    "vllm-chat": Export(_ENGINES, "the same for /v1/chat/completions", "embedding"),
    "sglang": Export(_ENGINES, "the same for /generate", "embedding"),
    "backbone": Export(
        "e2p_jax.export.weights:export_backbone",
        "a model directory of the backbone alone, for a run that trained it",
        "all",
    ),
}


@functools.cache
def load_plugins() -> None:
    """Imports the modules that installed packages name as entry points of the group `e2p_jax.plugins`.

    Raises:
      UserError: one cannot be imported.
    """
    for plugin in importlib.metadata.entry_points(group="e2p_jax.plugins"):
        try:
            plugin.load()
        except Exception as error:  # whatever a module may raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"plugin {plugin.name} ({plugin.value}): {reason}; mend it, or uninstall it") from error


def plugins_of(choices: Iterable[Choice]) -> list[str]:
    """The packages that have what was chosen, but for this one."""
    return sorted({choice.place.partition(":")[0].partition(".")[0] for choice in choices} - {"e2p_jax"})


def described(table: Mapping[str, Choice]) -> str:
    """`name: what; name: what.`"""
    return "; ".join(f"{name}: {choice.what}" for name, choice in table.items()) + "."


def one_of(table: Mapping[str, Any]) -> Any:
    """Makes `Annotated[str, ...]` a choice of a table's names: those that there are when a value is parsed or checked,
    or help is shown, which describes them.
    """

    def choice() -> Any:
        return Literal[tuple(table)]

    def hint(default: str) -> str:
        choices = {name: line for name, line in table.items() if isinstance(line, Choice)}
        return f"{described(choices) if choices else ''} (default: {default.strip('[]').strip(chr(39))})".strip()

    return tyro.conf.arg(constructor_factory=choice, help_behavior_hint=hint)
