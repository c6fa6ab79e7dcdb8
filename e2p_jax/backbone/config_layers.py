"""What keys of `config.json` say of each layer: which rope it has, and how far back it sees."""

import functools
from typing import Any

from e2p_jax.backbone.config_reader import Reader, short
from e2p_jax.backbone.rope import Rope, parse_rope
from e2p_jax.errors import UserError


def one_rope(
    reader: Reader,
    fields: dict[str, Any],
    dialects: list[dict[str, Any] | None],
    theta: tuple[str, float],
    partial: bool = False,
) -> tuple[Rope, int]:
    """A rope that both dialects may describe: transformers 4 (`rope_theta`, `rope_scaling`), 5 (`rope_parameters`).

    Args:
      dialects: what each says, None where it says nothing.
      theta: the key of the base, and its value where nothing says it.
      partial: whether `partial_rotary_factor` is known.
    """
    key, default = theta
    given = reader.take(key, None)
    base: dict[str, Any] = {"rope_theta": default if given is None else given}
    if partial:
        base["partial_rotary_factor"] = reader.take("partial_rotary_factor", 1.0)
    for settings in dialects:
        if settings is not None and type(settings) is not dict:
            raise UserError(f"{reader.source}: the settings of a rope are {short(settings)}; they must be an object")
    stated = [{k: v for k, v in settings.items() if v is not None} for settings in dialects if settings]
    parse = functools.partial(
        parse_rope,
        head_dim=fields["head_dim"],
        max_positions=fields["max_positions"],
        partial=partial,
        source=reader.source,
    )
    ropes = {parse(base | settings) for settings in stated or [{}]}
    if len(ropes) > 1 or any(settings.get("rope_theta", given) != given for settings in stated if given is not None):
        raise UserError(
            f"{reader.source}: rope_parameters contradicts rope_scaling or {key}; keep what the model was trained with"
        )
    return ropes.pop()


def plain_rope(reader: Reader, fields: dict[str, Any], theta: float = 10_000.0) -> dict[str, Any]:
    """One rope for all layers."""
    dialects = [reader.settings(key) for key in ("rope_parameters", "rope_scaling")]
    rope, limit = one_rope(reader, fields, dialects, ("rope_theta", theta))
    return {"ropes": (rope,), "layer_ropes": (0,) * fields["num_layers"], "max_positions": limit}


def phi3_rope(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """Older names of longrope, and the length it was trained with beside it instead of in it."""
    original = reader.size("original_max_position_embeddings")

    def spelled(settings: dict[str, Any] | None) -> dict[str, Any] | None:
        kind = settings and settings.get("rope_type", settings.get("type"))
        if not settings or kind not in ("longrope", "su", "yarn"):
            return settings
        return {k: v for k, v in settings.items() if k != "type"} | {
            "rope_type": "longrope",
            "original_max_position_embeddings": original,
        }

    dialects = [spelled(reader.settings(key)) for key in ("rope_parameters", "rope_scaling")]
    rope, limit = one_rope(reader, fields, dialects, ("rope_theta", 10_000.0), partial=True)
    return {"ropes": (rope,), "layer_ropes": (0,) * fields["num_layers"], "max_positions": limit}


def smollm3_rope(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """Every fourth layer without positions, unless `no_rope_layers` (1: with) says otherwise."""
    read = plain_rope(reader, fields, theta=2_000_000.0)
    layers = fields["num_layers"]
    interval = reader.size("no_rope_layer_interval")
    rotated = reader.each("no_rope_layers", [int((i + 1) % interval != 0) for i in range(layers)], int)
    if len(rotated) != layers:
        raise UserError(f"{reader.source}: no_rope_layers has {len(rotated)} entries for {layers} layers")
    (rope,) = read["ropes"]
    nope = Rope((0.0,) * len(rope.frequencies))
    return read | {"ropes": (rope, nope), "layer_ropes": tuple(0 if r else 1 for r in rotated)}


def gemma3_ropes(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """One rope for the layers that see everything, one for those with a window."""
    nested = reader.settings("rope_parameters", {}) or {}
    if not nested.keys() <= {"full_attention", "sliding_attention"}:
        raise UserError(f"{reader.source}: rope_parameters {sorted(nested)}; needs full_attention, sliding_attention")
    scaling = reader.settings("rope_scaling")
    full, limit = one_rope(reader, fields, [nested.get("full_attention"), scaling], ("rope_theta", 1_000_000.0))
    local, local_limit = one_rope(reader, fields, [nested.get("sliding_attention")], ("rope_local_base_freq", 10_000.0))
    which = tuple(int(window > 0) for window in fields["windows"])
    return {"ropes": (full, local), "layer_ropes": which, "max_positions": min(limit, local_limit)}


def unlimited(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    return {"windows": (0,) * fields["num_layers"]}


def one_window(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    return {"windows": (reader.size("sliding_window", 0, least=0),) * fields["num_layers"]}


def layer_windows(reader: Reader, fields: dict[str, Any], window: int, default: list[bool]) -> dict[str, Any]:
    """`layer_types`, or where it is absent `default`: which layers have the window."""
    default_kinds = ["sliding_attention" if sliding else "full_attention" for sliding in default]
    kinds = reader.each("layer_types", default_kinds, str)
    supported = {"full_attention", "sliding_attention"} if window else {"full_attention"}
    if not supported.issuperset(kinds):
        raise UserError(
            f"{reader.source}: layer_types {kinds} with a sliding window of {window}; supported: {sorted(supported)}"
        )
    if len(kinds) != fields["num_layers"]:
        raise UserError(f"{reader.source}: layer_types has {len(kinds)} entries for {fields['num_layers']} layers")
    return {"windows": tuple(window if kind == "sliding_attention" else 0 for kind in kinds)}


def switched_window(reader: Reader) -> int:
    """`sliding_window`, where `use_sliding_window` turns it on."""
    window = reader.size("sliding_window", 0, least=0)
    return window if reader.flag("use_sliding_window", False) else 0


def late_windows(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """Qwen: the first `max_window_layers` layers see everything."""
    window, layers = switched_window(reader), fields["num_layers"]
    first = reader.size("max_window_layers", layers, least=0)
    return layer_windows(reader, fields, window, [bool(window) and i >= first for i in range(layers)])


def all_windows(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """Qwen3-MoE: all layers have the window, if there is one."""
    return {"windows": (switched_window(reader),) * fields["num_layers"]}


def nope_windows(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """SmolLM3: the layers without positions are those with a window, if there is one."""
    window = switched_window(reader)
    return layer_windows(reader, fields, window, [bool(window) and rope == 1 for rope in fields["layer_ropes"]])


def alternating_windows(reader: Reader, fields: dict[str, Any], every: int = 2) -> dict[str, Any]:
    """Gemma: every second layer sees everything."""
    window = reader.size("sliding_window", 0, least=0)
    return layer_windows(reader, fields, window, [(i + 1) % every > 0 for i in range(fields["num_layers"])])


def gemma3_windows(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """As often as `sliding_window_pattern` says."""
    return alternating_windows(reader, fields, reader.size("sliding_window_pattern"))
