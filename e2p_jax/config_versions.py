"""What earlier versions wrote in a config, and where it went."""

from typing import Any

from e2p_jax.errors import UserError

_FLAGS = {"--backbone.lora_rank": "--adapter.kind lora --adapter.rank N"}
_FIELDS = {
    "lora_rank": "adapter=e2p_jax.backbone.lora.Settings(rank=...)",
    "hidden_size": "projector=e2p_jax.prefix.mlp.Settings(hidden_size=...)",
    "dropout": "projector=e2p_jax.prefix.mlp.Settings(dropout=...)",
}
# Of training alone; a run that had one of the first of each section other than 0 is not trained further.
GONE = {"train": ("distill", "teacher_tokens", "teacher_temperature", "borrowed"), "projector": ("shrink",)}


def upgraded(sections: dict[str, Any]) -> dict[str, Any]:
    """The sections of an earlier config.json -> of today's.

    They had `backbone.lora_rank`, 0 for no adapters, the fields of the MLP for every kind of projector, no bound of
    soft tokens (`projector.max_scale`), and distillation and `projector.shrink`, which have no say in how a projector
    is read.

    Raises:
      UserError: a catalogue's head was trained on something else than what it would read today.
    """
    sections = {name: dict(values) if isinstance(values, dict) else values for name, values in sections.items()}
    backbone, projector = sections.get("backbone"), sections.get("projector")
    if isinstance(backbone, dict) and (rank := backbone.pop("lora_rank", 0)):
        sections["adapter"] = {"kind": "lora", "rank": rank}
    if isinstance(projector, dict) and projector.get("kind") == "linear":
        for name in ("hidden_size", "dropout"):
            projector.pop(name, None)
    if isinstance(projector, dict):
        projector.setdefault("max_scale", 0.0)
    for section, names in GONE.items():
        if isinstance(values := sections.get(section), dict):
            for name in names:
                values.pop(name, None)
    data, items = sections.get("data"), sections.get("items")
    if isinstance(data, dict) and data.get("items") and isinstance(items, dict) and "token" not in items:
        raise UserError(
            "items.token is missing: an earlier version trained this run's head over data.items, on hidden states and "
            "not on their directions, and it would rank otherwise today; train it anew"
        )
    return sections


def moved_flag(flag: str) -> str | None:
    """What a flag is now."""
    return _FLAGS.get("--" + flag.removeprefix("--").replace("-", "_"))


def moved_field(error: BaseException) -> str | None:
    """What a field is now that a config file gives to its earlier section."""
    where = (where for name, where in _FIELDS.items() if isinstance(error, TypeError) and f"'{name}'" in str(error))
    return next(where, None)
