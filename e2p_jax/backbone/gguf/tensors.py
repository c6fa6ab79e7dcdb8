"""The weights of a file under their Hugging Face names, dequantised when they are read."""

from typing import Any

import ml_dtypes
import numpy as np

from e2p_jax.backbone.gguf.config import ROPE_TENSORS, Architecture, architecture
from e2p_jax.backbone.gguf.file import GgufFile, Stored, gguf_package
from e2p_jax.backbone.layout import DecoderConfig, tensor_names
from e2p_jax.backbone.lazy import Lazy

_PLAIN = {0: np.dtype(np.float32), 1: np.dtype(np.float16), 30: np.dtype(ml_dtypes.bfloat16)}  # kinds without blocks


def tensors(file: GgufFile, config: DecoderConfig) -> dict[str, np.ndarray | Lazy]:
    """Hugging Face name -> tensor. What is no parameter of the decoder keeps the file's name, settings are left out.

    Args:
      config: as read from what `make_config` gives.
    """
    gguf, kind = gguf_package(file.path), architecture(file)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[file.text("general.architecture")], config.num_layers)
    left = {name: stored for name, stored in file.tensors.items() if name not in ROPE_TENSORS}
    found: dict[str, np.ndarray | Lazy] = {}
    for template in dict.fromkeys(tensor_names(config).values()):
        for layer in range(config.num_layers if "{}" in template else 1):
            name = template.replace("{}", str(layer), 1)
            if config.experts_together and ".experts." in name:
                found |= _together(gguf, name, left, layer)
                continue
            module, _, suffix = name.replace(".experts.{}.", ".experts.").rpartition(".")
            if suffix not in ("weight", "bias"):
                module, suffix = name, "weight"
            stored = left.pop(f"{names.get_name(module)}.{suffix}", None)
            if stored is not None and name.endswith("shared_expert_gate.weight"):
                stored = stored._replace(shape=(1, stored.shape[-1]))
            if stored is not None and "{}" in name:
                for expert in range(stored.shape[0]):
                    found[name.format(expert)] = _tensor(gguf, _expert(stored, expert))
            elif stored is not None:
                offset = kind.norm_offset if name.endswith("norm.weight") else 0.0
                found[name] = _tensor(gguf, stored, offset, _rows(kind, name, stored, config))
    return found | {name: _tensor(gguf, stored) for name, stored in left.items()}


def _together(gguf: Any, name: str, left: dict[str, Stored], layer: int) -> dict[str, Lazy]:
    """A tensor of a layer's experts, [X, in, out] or [X, out], taken out of `left`: gate and up in turns, or down."""
    kind = "bias" if name.endswith("_bias") else "weight"
    parts = ("gate", "up") if "gate_up" in name else ("down",)
    stored = [left.pop(f"blk.{layer}.ffn_{part}_exps.{kind}", None) for part in parts]
    held = [_tensor(gguf, each) for each in stored if each is not None]
    if len(held) != len(parts):
        return {}
    count, *shape = held[0].shape
    shape[0] *= len(parts)

    def rows(first: int, last: int) -> np.ndarray:
        each = np.stack([np.asarray(tensor[first:last], np.float32) for tensor in held], axis=2)
        return each.reshape(-1, *shape).swapaxes(1, -1)

    return {name: Lazy((count, *shape[::-1]), rows)}


def _expert(stored: Stored, expert: int) -> Stored:
    rows = stored.shape[1]
    return Stored(stored.shape[1:], stored.kind, stored.data[expert * rows : (expert + 1) * rows])


def _rows(kind: Architecture, name: str, stored: Stored, config: DecoderConfig) -> np.ndarray | None:
    """Which row of the file is each of ours, where they differ.

    Queries and keys turn in pairs (2i, 2i + 1) of a head in llama.cpp's order, (i, i + C / 2) in transformers'.
    """
    if not kind.interleaved or not any(part in name for part in (".q_proj.", ".k_proj.")):
        return None
    theirs = np.arange(stored.shape[0]).reshape(-1, config.head_dim // 2, 2)
    return theirs.swapaxes(1, 2).reshape(-1)


def _tensor(gguf: Any, stored: Stored, offset: float = 0.0, order: np.ndarray | None = None) -> np.ndarray | Lazy:
    """Mapped where the file holds it as it is to be, else worked out when it is read.

    Args:
      gguf: the package.
      offset: taken off all numbers.
      order: as `_rows` gives.
    """
    plain = _PLAIN.get(stored.kind)
    if plain is not None and not offset and order is None:
        return stored.data.reshape(-1).view(plain).reshape(stored.shape)
    each = stored.data.reshape(stored.shape[0], -1)  # bytes of a row, or of a number where there is one axis

    def rows(first: int, last: int) -> np.ndarray:
        chosen = np.ascontiguousarray(each[first:last] if order is None else each[order[first:last]])
        if plain is None:
            return gguf.dequantize(chosen, gguf.GGMLQuantizationType(stored.kind)).reshape(-1, *stored.shape[1:])
        return chosen.view(plain).astype(np.float32).reshape(-1, *stored.shape[1:]) - np.float32(offset)

    return Lazy(stored.shape, rows)
