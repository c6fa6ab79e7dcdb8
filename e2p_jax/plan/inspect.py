"""What can be said of a backbone before anything of it is loaded: from config.json and the tokenizer's files alone."""

import collections
import itertools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
from transformers import PreTrainedTokenizerBase

from e2p_jax.backbone.families import FAMILIES, WRAPPERS, inert_keys, parse_config, unknown_keys
from e2p_jax.backbone.gguf import checkpoint as gguf
from e2p_jax.backbone.layout import DecoderConfig
from e2p_jax.backbone.packed import check_method
from e2p_jax.backbone.quantize import KINDS, Quantization
from e2p_jax.backbone.rope import Rope
from e2p_jax.backbone.weights import abstract, find_config, form_of, parameters
from e2p_jax.config import Config
from e2p_jax.data.encode import Encoder, load_tokenizer
from e2p_jax.data.stops import named_stops
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError
from e2p_jax.json_files import read_object

T = TypeVar("T")

_SAMPLE = ("What do you like?", "Long walks.", "And what else?", "Old films, too.")
_ANY_SIZE = 2**31  # of a vocabulary that is not known


def inspect(model: str, revision: str | None) -> dict[str, Any]:
    """The answers, as JSON takes them; `refused` lists what a run would be refused for, a line each.

    Args:
      model: what `backbone.path` takes, or a shape that `configs/backbones` holds.
      revision: of a hub id.

    Raises:
      UserError: there is no such model, its config.json is no JSON, or it is a GGUF file that is refused.
    """
    directory = find_config(model, revision)
    source = directory / "config.json"
    if not source.is_file():
        raise UserError(f"{source}: not found; give a Hugging Face model directory, a GGUF file or a hub id")
    values = read_object(source, "take it from the model's own repository")
    refused: list[str] = []

    def attempt(make: Callable[[], T]) -> T | None:
        try:
            return make()
        except UserError as error:
            refused.append(str(error))
            return None

    quantization = values.pop("quantization_config", None)
    if quantization is not None:
        attempt(lambda: check_method(quantization, source))
    form = form_of(directory)
    if form == "GGUF":
        quantization = {"quant_method": "gguf", "tensors": gguf.kinds(directory)}
    unknown = attempt(lambda: unknown_keys(values, source)) or []
    if unknown:
        attempt(lambda: parse_config(values, source))
    known = values.get("model_type") in FAMILIES | WRAPPERS
    decoder = attempt(lambda: parse_config(values, source, unknown)) if known else None
    found: dict[str, Any] = {
        "model": model,
        "directory": str(directory),
        "form": form,
        "family": values.get("model_type"),
        "dtype": values.get("dtype", values.get("torch_dtype")),
        "quantization": quantization,
        "unknown_keys": unknown,
    }
    if decoder is not None:
        found |= {"inert_keys": inert_keys(values), **_shape(decoder), "memory": _memory(decoder)}
    rows = decoder.vocab_size if decoder else _ANY_SIZE
    tokenizer = attempt(lambda: load_tokenizer(directory, rows))
    if tokenizer is not None:
        found |= _tokenizer(tokenizer)
        encoder = attempt(lambda: Encoder.from_config(Config(), tokenizer, rows, named_stops(directory)))
        if encoder is not None:
            found |= {"notes": list(encoder.notes), "warnings": list(encoder.warnings)}
            found["stops"] = {str(tokenizer.convert_ids_to_tokens(stop)): stop for stop in encoder.stops}
            found["sample"] = attempt(lambda: _sample(encoder))
    return found | {"refused": list(dict.fromkeys(refused))}


def _shape(decoder: DecoderConfig) -> dict[str, Any]:
    """Sizes, and what differs from layer to layer: how many layers have it."""
    names = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
    of_keys = [layer for layer in range(decoder.num_layers) if layer not in decoder.linear_layers]
    windows = collections.Counter(decoder.windows[layer] for layer in of_keys)
    turns = collections.Counter(decoder.layer_ropes[layer] for layer in of_keys if decoder.ropes)
    heads = {f"{kind}_heads": getattr(decoder, f"linear_{kind}_heads") for kind in ("key", "value")}
    return {
        "sizes": {
            **{name: getattr(decoder, name) for name in names},
            "experts": decoder.num_experts,
            "experts_per_token": decoder.experts_per_token,
            "dense_layers": list(decoder.dense_layers),
            "dense_size": decoder.dense_size,
            "tied_head": decoder.tie_head,
            "positions": decoder.max_positions,
        },
        "windows": [{"layers": count, "positions": window or None} for window, count in windows.most_common()],
        "linear": {"layers": len(decoder.linear_layers), **heads},
        "ropes": [{"layers": count, **_rope(decoder.ropes[rope])} for rope, count in turns.most_common()],
    }


def _rope(rope: Rope) -> dict[str, Any]:
    """Wavelengths in positions; none in layers without positions."""
    waves = [2 * math.pi / frequency for frequency in rope.frequencies if frequency]
    return {
        "rotated": 2 * len(waves),
        "wavelengths": [round(min(waves), 3), round(max(waves), 3)] if waves else None,
        "scale": rope.scale,
    }


def _memory(decoder: DecoderConfig) -> dict[str, Any]:
    """Parameters, and their bytes by dtype and by `backbone.quantization`, in bfloat16 what is not quantised."""

    def held(dtype: str, kind: Quantization = "none") -> dict[str, Any]:
        return parameters(abstract(decoder, dtype=jnp.dtype(dtype), quantization=kind))

    def size(leaves: dict[str, Any]) -> int:
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves.values())

    plain = held("float32")
    count = sum(math.prod(leaf.shape) for leaf in plain.values())
    by_kind = {kind: size(held("bfloat16", kind)) for kind in KINDS}
    return {"parameters": count, "bytes": {"float32": size(plain), "bfloat16": size(held("bfloat16")), **by_kind}}


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    template = tokenizer.chat_template
    chosen = "plain: the tokenizer has none" if template is None else "the tokenizer's own"
    if template is not None and "endgeneration" not in str(template):
        chosen += ", replies marked by e2p_jax"
    special = {name: getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "pad", "unk")}
    return {"tokenizer": {"class": type(tokenizer).__name__, "tokens": len(tokenizer), **special}, "template": chosen}


def _sample(encoder: Encoder) -> list[dict[str, Any]]:
    """A conversation as training gets it, without slots, in pieces: targets or not, stop tokens by themselves."""
    roles = itertools.cycle(("user", "assistant"))
    messages = tuple({"role": role, "content": text} for role, text in zip(roles, _SAMPLE, strict=False))
    example = encoder.encode(Record("sample", (), messages, source="a sample conversation"), "none")
    pairs = zip(example.tokens.tolist(), example.is_target.tolist(), strict=True)
    pieces = itertools.groupby(pairs, lambda pair: (pair[1], pair[0] if pair[0] in encoder.stops else None))
    return [
        {
            "text": str(encoder.tokenizer.decode([token for token, _ in run])),
            "target": is_target,
            "stop": stop is not None,
        }
        for (is_target, stop), run in pieces
    ]
