"""What keys of `config.json` say of each layer: which rope it has, and how far back it sees."""

import functools
import math
from collections.abc import Callable
from typing import Any

from e2p_jax.backbone.config_reader import Reader, short
from e2p_jax.backbone.rope import Rope, parse_rope
from e2p_jax.errors import UserError
from e2p_jax.json_files import is_number


def one_rope(
    reader: Reader,
    fields: dict[str, Any],
    dialects: list[dict[str, Any] | None],
    theta: tuple[str, float],
    partial: tuple[str, float] | None = None,
) -> tuple[Rope, int]:
    """A rope that both dialects may describe: transformers 4 (`rope_theta`, `rope_scaling`), 5 (`rope_parameters`).

    Args:
      dialects: what each says, None where it says nothing.
      theta: the key of the base, and its value where nothing says it.
      partial: the key of the share of a head that is rotated, and its value; None where it is all of it.
    """
    key, default = theta
    given = reader.take(key, None)
    base: dict[str, Any] = {"rope_theta": default if given is None else given}
    if partial:
        base["partial_rotary_factor"] = reader.take(*partial)
    for settings in dialects:
        if settings is not None and type(settings) is not dict:
            raise UserError(f"{reader.source}: the settings of a rope are {short(settings)}; they must be an object")
    stated = [{k: v for k, v in settings.items() if v is not None} for settings in dialects if settings]
    parse = functools.partial(
        parse_rope,
        head_dim=fields["head_dim"],
        max_positions=fields["max_positions"],
        partial=partial is not None,
        source=reader.source,
    )
    ropes = {parse(base | settings) for settings in stated or [{}]}
    if len(ropes) > 1 or any(settings.get("rope_theta", given) != given for settings in stated if given is not None):
        raise UserError(
            f"{reader.source}: rope_parameters contradicts rope_scaling or {key}; keep what the model was trained with"
        )
    return ropes.pop()


_Settings = dict[str, Any] | None
PARTIAL = ("partial_rotary_factor", 1.0)


def plain_rope(
    reader: Reader,
    fields: dict[str, Any],
    theta: float = 10_000.0,
    theta_key: str = "rope_theta",
    partial: tuple[str, float] | None = None,
    spelled: Callable[[_Settings], _Settings] = lambda settings: settings,
) -> dict[str, Any]:
    """One rope for all layers.

    Args:
      theta: where nothing says it.
      theta_key: of older configs.
      partial: as in `one_rope`.
      spelled: a dialect's settings in the family's spelling -> in the usual one.
    """
    dialects = [spelled(reader.settings(key)) for key in ("rope_parameters", "rope_scaling")]
    rope, limit = one_rope(reader, fields, dialects, (theta_key, theta), partial)
    return {"ropes": (rope,), "layer_ropes": (0,) * fields["num_layers"], "max_positions": limit}


partial_rope = functools.partial(plain_rope, partial=PARTIAL)
neox_rope = functools.partial(plain_rope, theta_key="rotary_emb_base", partial=("rotary_pct", 0.25))


def hunyuan_rope(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """What is called dynamic and has an `alpha` is not: the base is stretched by that, and nothing else is read."""

    def spelled(settings: _Settings) -> _Settings:
        kind = settings and settings.get("rope_type", settings.get("type"))
        if not settings or kind != "dynamic" or not settings.get("alpha"):
            return settings
        return {key: settings[key] for key in ("alpha", "rope_theta") if key in settings} | {"rope_type": "stretched"}

    return plain_rope(reader, fields, spelled=spelled)


def ministral3_rope(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """Queries grow with their position, by settings that stand among the rope's."""
    if not any(reader.values.get(key) for key in ("rope_parameters", "rope_scaling")):
        reader.values["rope_parameters"] = _MINISTRAL3_ROPE
    found: dict[str, Any] = {}
    own = {"llama_4_scaling_beta": "query_growth", "original_max_position_embeddings": "query_period"}

    def spelled(settings: _Settings) -> _Settings:
        if settings:
            found.update({own[key]: settings[key] for key in own if settings.get(key) is not None})
        others = ("llama_4_scaling_beta", "max_position_embeddings")
        return settings and {key: value for key, value in settings.items() if key not in others}

    read = plain_rope(reader, fields, spelled=spelled)
    growth, period = found.get("query_growth", 0.0), found.get("query_period", fields["max_positions"])
    if not is_number(growth) or growth < 0:
        reader.refuse("llama_4_scaling_beta", growth, "a number from 0")
    return read | {"query_growth": float(growth), "query_period": int(period)}


def latent_attention(reader: Reader, fields: dict[str, Any], interleaved: bool | None = None) -> dict[str, Any]:
    """Heads of a rotated part and a plain one, made of latent vectors; the scale of the scores goes by the rope's.

    Args:
      interleaved: how the part is rotated; None where `rope_interleave` says it.
    """
    rotated, values = reader.size("qk_rope_head_dim"), reader.size("v_head_dim")
    width = rotated + reader.size("qk_nope_head_dim")
    if values > width:
        reader.refuse("v_head_dim", values, f"at most qk_nope_head_dim + qk_rope_head_dim, {width}")
    if fields["num_kv_heads"] != fields["num_heads"]:
        reader.refuse("num_key_value_heads", fields["num_kv_heads"], f"num_attention_heads, {fields['num_heads']}")
    for key, value, what in (("head_dim", rotated, ""), ("qk_head_dim", width, " + qk_nope_head_dim")):
        if (stated := reader.take(key, value)) != value:
            reader.refuse(key, stated, f"qk_rope_head_dim{what}, {value}")
    found: dict[str, Any] = {}

    def spelled(settings: _Settings) -> _Settings:
        found.update(settings or {})
        return settings

    read = plain_rope(reader, fields | {"head_dim": rotated}, spelled=spelled)
    grown = 1.0
    if (share := found.get("mscale_all_dim")) and found["factor"] > 1:
        grown += 0.1 * share * math.log(found["factor"])
    queries = reader.size("q_lora_rank", 0, least=0)
    return read | {
        "head_dim": width,
        "attention_scale": width**-0.5 * grown**2,
        "latent_size": reader.size("kv_lora_rank"),
        "query_latent_size": queries,
        "shared_key_size": rotated,
        "latent_value_size": values,
        "fused_by_head": ("k", "v"),
        "naming": "deepseek_latent" if queries else "deepseek",
        "interleaved": reader.flag("rope_interleave") if interleaved is None else interleaved,
    }


interleaved_latents = functools.partial(latent_attention, interleaved=True)

_MINISTRAL3_ROPE = {
    "type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def gpt_oss_rope(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    if not any(reader.values.get(key) for key in ("rope_parameters", "rope_scaling")):
        reader.values["rope_parameters"] = _GPT_OSS_ROPE
    return plain_rope(reader, fields, theta=150_000.0)


_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def window_ropes(reader: Reader, fields: dict[str, Any], unless_none: bool = False) -> dict[str, Any]:
    """Layers that see everything are without positions; `unless_none`: not where there is no window at all."""
    read = plain_rope(reader, fields)
    if unless_none and not any(fields["windows"]):
        return read
    (rope,) = read["ropes"]
    nope = Rope((0.0,) * len(rope.frequencies))
    return read | {"ropes": (rope, nope), "layer_ropes": tuple(int(window == 0) for window in fields["windows"])}


def phi3_rope(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """Older names of longrope, and the length it was trained with beside it instead of in it."""
    original = reader.size("original_max_position_embeddings")

    def spelled(settings: _Settings) -> _Settings:
        kind = settings and settings.get("rope_type", settings.get("type"))
        if not settings or kind not in ("longrope", "su", "yarn"):
            return settings
        return {k: v for k, v in settings.items() if k != "type"} | {
            "rope_type": "longrope",
            "original_max_position_embeddings": original,
        }

    return partial_rope(reader, fields, spelled=spelled)


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


def gemma3_ropes(
    reader: Reader,
    fields: dict[str, Any],
    theta: float = 1_000_000.0,
    local: tuple[str, float] = ("rope_local_base_freq", 10_000.0),
) -> dict[str, Any]:
    """One rope for the layers that see everything, one for those with a window."""
    nested = reader.settings("rope_parameters", {}) or {}
    if not nested.keys() <= {"full_attention", "sliding_attention"}:
        raise UserError(f"{reader.source}: rope_parameters {sorted(nested)}; needs full_attention, sliding_attention")
    scaling = reader.settings("rope_scaling")
    full, limit = one_rope(reader, fields, [nested.get("full_attention"), scaling], ("rope_theta", theta))
    near, near_limit = one_rope(reader, fields, [nested.get("sliding_attention")], local)
    which = tuple(int(window > 0) for window in fields["windows"])
    return {"ropes": (full, near), "layer_ropes": which, "max_positions": min(limit, near_limit)}


def olmo3_ropes(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """Of the older dialect transformers 5 gives another base to the one kind of layers only."""
    reader.require("rope_theta", (500_000,), 500_000)
    return gemma3_ropes(reader, fields, 500_000.0, ("rope_theta", 500_000.0))


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


def linear_layers(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """Qwen3-Next: every fourth layer has keys and values, or as often as `full_attention_interval` says."""
    count, every = fields["num_layers"], reader.size("full_attention_interval")
    default = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(count)]
    kinds = reader.each("layer_types", default, str)
    if len(kinds) != count or not {"full_attention"} <= {*kinds} <= {"full_attention", "linear_attention"}:
        reader.refuse(
            "layer_types", kinds, f"full_attention or linear_attention for each of {count} layers, not all linear"
        )
    return {
        "windows": (0,) * count,
        "linear_layers": tuple(i for i, kind in enumerate(kinds) if kind == "linear_attention"),
    }


def switched_window(reader: Reader) -> int:
    """`sliding_window`, where `use_sliding_window` turns it on."""
    window = reader.size("sliding_window", 0, least=0)
    return window if reader.flag("use_sliding_window", False) else 0


def late_windows(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """Qwen: the first `max_window_layers` layers see everything."""
    window, layers = switched_window(reader), fields["num_layers"]
    first = reader.size("max_window_layers", layers, least=0)
    return layer_windows(reader, fields, window, [bool(window) and i >= first for i in range(layers)])


def every_second_early_window(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """Qwen2-MoE: every second one of the first `max_window_layers` layers has the window, if there is one."""
    window, layers = switched_window(reader), fields["num_layers"]
    first = reader.size("max_window_layers", layers, least=0)
    return layer_windows(reader, fields, window, [bool(window) and i % 2 == 0 and i < first for i in range(layers)])


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


def exaone4_windows(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """Every fourth layer sees everything; patterns in letters are published with `layer_types` beside them."""
    window = reader.size("sliding_window", 0, least=0)
    every = reader.take("sliding_window_pattern", 0)
    if not window or reader.values.get("layer_types") is not None:
        return layer_windows(reader, fields, window, [False] * fields["num_layers"])
    if type(every) is not int or every < 1:
        reader.refuse("sliding_window_pattern", every, "a whole number from 1 where there are no layer_types")
    return layer_windows(reader, fields, window, [(i + 1) % every > 0 for i in range(fields["num_layers"])])


windows_but_every_fourth = functools.partial(alternating_windows, every=4)


def gemma3_windows(reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """As often as `sliding_window_pattern` says."""
    return alternating_windows(reader, fields, reader.size("sliding_window_pattern"))
