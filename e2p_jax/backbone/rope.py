"""Rotary position embedding (Su et al., arXiv 2104.09864): what HF's `rope_scaling` and `rope_parameters` mean.

Every kind comes down to a list of frequencies and one factor on the rotated vectors, worked out from `config.json`.
`dynamic` and `longrope` choose frequencies by the length of the text: both are constant up to the length that the
model was trained with, and there the decoder's positions end.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from e2p_jax.errors import UserError
from e2p_jax.json_files import is_number


@dataclasses.dataclass(frozen=True)
class Rope:
    """The rotation of queries and keys in a layer."""

    frequencies: tuple[float, ...]
    """Radians per position, one for each rotated pair; zeros in a layer without positions (NoPE, arXiv 2305.19466)."""
    scale: float = 1.0
    """Factor on the rotated queries and keys alike: yarn's and longrope's `attention_factor`."""


# Kind -> settings it needs, settings it may have; all have `rope_theta` and, in some families, `partial_rotary_factor`.
_SETTINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "stretched": (("alpha",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (
        ("short_factor", "long_factor", "original_max_position_embeddings"),
        ("factor", "attention_factor"),
    ),
}
# Settings without effect: notes on training, and how places in an image share the pairs, all the same in text.
_INERT = ("finetuned", "mrope_section", "mrope_interleaved")
# Settings that say what is done anyway. transformers reads no `attn_factor`.
_NEUTRAL: dict[str, dict[str, Any]] = {kind: {"attn_factor": 1.0} for kind in _SETTINGS}
_NEUTRAL["default"]["factor"] = 1.0
_UNUSED = {"default": ("original_max_position_embeddings",), "linear": ("original_max_position_embeddings",)}


def parse_rope(
    settings: dict[str, Any], *, head_dim: int, max_positions: int, partial: bool, source: Path
) -> tuple[Rope, int]:
    """Settings of one rope, in either dialect's spelling -> the rope, and how many positions it holds for.

    Args:
      settings: `rope_theta`, `rope_type` (or `type`) and what that kind needs; None is absent.
      head_dim: C.
      max_positions: `max_position_embeddings`.
      partial: whether the family can rotate the first `partial_rotary_factor` of a head and leave the rest.
      source: names the file in errors.

    Raises:
      UserError: an unknown kind, settings missing, unknown or of the wrong length, or an odd width.
    """
    settings = {key: value for key, value in settings.items() if value is not None}
    legacy = settings.pop("type", "default")
    kind = settings.pop("rope_type", legacy)
    if kind == "mrope":
        kind = "default"
    if not isinstance(kind, str) or kind not in _SETTINGS:
        raise UserError(f"{source}: rope kind {kind!r} is not supported; supported: {', '.join(_SETTINGS)}")
    for key, value in settings.items():
        if key in _KNOWN and not _fits(key, value):
            raise UserError(
                f"{source}: rope kind {kind!r} has {key}={str(value)[:60]}; it must be {_WANTED.get(key, _NUMBER)}"
            )
    for key, value in list(settings.items()):
        if key in (*_INERT, *_UNUSED.get(kind, ())) or (key in _NEUTRAL[kind] and value == _NEUTRAL[kind][key]):
            del settings[key]
    rotated = settings.pop("partial_rotary_factor", 1.0)
    if rotated != 1.0 and not partial:
        raise UserError(f"{source}: rope kind {kind!r} has partial_rotary_factor={rotated}, which the family has not")
    width = int(head_dim * rotated)
    if width % 2:
        raise UserError(f"{source}: rope kind {kind!r} would rotate {width} of {head_dim} numbers; it takes pairs")
    required, optional = _SETTINGS[kind]
    if not {"rope_theta", *required} <= settings.keys() <= {"rope_theta", *required, *optional}:
        raise UserError(
            f"{source}: rope kind {kind!r} needs the settings {list(required)} and may have {list(optional)}, "
            f"has {sorted(settings)}"
        )
    try:
        rope, limit = _rope(kind, settings, width, max_positions, source)
    except (ArithmeticError, ValueError) as error:  # a logarithm of one, bounds in the wrong order
        raise UserError(f"{source}: the settings of rope kind {kind!r} contradict each other ({error})") from error
    if not all(map(math.isfinite, (*rope.frequencies, rope.scale))):
        raise UserError(f"{source}: the settings of rope kind {kind!r} give infinite frequencies")
    return rope, limit


_KNOWN = {"rope_theta", "partial_rotary_factor"}.union(*(keys for both in _SETTINGS.values() for keys in both))
_NUMBER = "a number above 0"
_WANTED = {
    "truncate": "true or false",
    "mscale": "a number from 0",
    "mscale_all_dim": "a number from 0",
    "short_factor": "a list of numbers above 0",
    "long_factor": "a list of numbers above 0",
    "partial_rotary_factor": "a number above 0, and 1 at most",
}


def _fits(key: str, value: Any) -> bool:
    """Tells whether a setting is of its type and range."""
    if key == "truncate":
        return isinstance(value, bool)
    numbers = value if key in ("short_factor", "long_factor") else [value]
    if not isinstance(numbers, list) or not all(is_number(number) and number >= 0 for number in numbers):
        return False
    if 0 in numbers and not key.startswith("mscale"):
        return False
    return key != "partial_rotary_factor" or value <= 1


def _rope(kind: str, settings: dict[str, Any], width: int, max_positions: int, source: Path) -> tuple[Rope, int]:
    """`parse_rope`, once the settings are there and of their types."""
    theta = float(settings["rope_theta"])
    if kind == "stretched":
        theta *= settings["alpha"] ** (width / (width - 2))
    plain = [theta ** (-2.0 * i / width) for i in range(width // 2)]
    if kind == "linear":
        return Rope(tuple(f / settings["factor"] for f in plain)), max_positions
    if kind == "llama3":
        return Rope(_llama3(plain, settings)), max_positions
    if kind == "yarn":
        return _yarn(plain, theta, settings), max_positions
    if kind == "longrope":
        return _longrope(plain, settings, max_positions, source)
    # dynamic: up to max_position_embeddings its base is the given one (transformers' modeling_rope_utils).
    return Rope(tuple(plain)), max_positions


def _llama3(plain: list[float], settings: dict[str, Any]) -> tuple[float, ...]:
    """Divides the low frequencies, keeps the high ones, blends between (Llama 3.1 release, `apply_scaling`)."""
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    if low >= high:
        raise ValueError("low_freq_factor is not below high_freq_factor")

    def scale(f: float) -> float:
        turns = settings["original_max_position_embeddings"] * f / (2 * math.pi)  # rotations over the original context
        blend = min(max((turns - low) / (high - low), 0.0), 1.0)
        return (1 - blend) * f / settings["factor"] + blend * f

    return tuple(scale(f) for f in plain)


def _yarn(plain: list[float], theta: float, settings: dict[str, Any]) -> Rope:
    """YaRN (Peng et al., arXiv 2309.00071): "NTK-by-parts" frequencies, section 3.2, and the scale of section 3.4."""
    factor, width = settings["factor"], 2 * len(plain)

    def pair_of(turns: float) -> float:
        """Index of the pair that makes so many turns over the original context."""
        original = settings["original_max_position_embeddings"]
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_of(settings.get("beta_fast", 32)), pair_of(settings.get("beta_slow", 1))
    if settings.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    if first == last:
        last += 0.001

    def scale(i: int, f: float) -> float:
        blend = min(max((i - first) / (last - first), 0.0), 1.0)
        return blend * f / factor + (1 - blend) * f

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, all_dim = settings.get("mscale"), settings.get("mscale_all_dim")
    default = magnitude(mscale) / magnitude(all_dim) if mscale and all_dim else magnitude(1.0)
    return Rope(tuple(scale(i, f) for i, f in enumerate(plain)), float(settings.get("attention_factor", default)))


def _longrope(plain: list[float], settings: dict[str, Any], max_positions: int, source: Path) -> tuple[Rope, int]:
    """LongRoPE (Ding et al., arXiv 2402.13753): a divisor for each pair; the short set, as far as it holds."""
    original = settings["original_max_position_embeddings"]
    for name in ("short_factor", "long_factor"):
        if len(settings[name]) != len(plain):
            raise UserError(f"{source}: rope kind 'longrope' needs {len(plain)} numbers as {name}")
    factor = settings.get("factor", max_positions / original)
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    rope = Rope(
        tuple(f / divisor for f, divisor in zip(plain, settings["short_factor"], strict=True)),
        float(settings.get("attention_factor", default)),
    )
    return rope, min(int(original), max_positions)
