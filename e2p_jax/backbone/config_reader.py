"""Reads a Hugging Face `config.json` key by key: what is asked for is checked, what nobody asked for is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from e2p_jax.errors import UserError
from e2p_jax.json_files import is_number

# Keys that change nothing in the forward pass: bookkeeping, initialisation, generation, tensor-parallel hints.
INERT = frozenset(
    """architectures model_type torch_dtype dtype transformers_version _name_or_path use_cache initializer_range
    pretraining_tp bos_token_id eos_token_id pad_token_id sep_token_id return_dict output_hidden_states
    output_attentions torchscript id2label label2id problem_type task_specific_params
    chunk_size_feed_forward finetuning_task tokenizer_class prefix auto_map attn_implementation
    _attn_implementation_autoset base_model_tp_plan is_llama_config tie_encoder_decoder
    transformers.js_config cross_attention_hidden_size cache_implementation
    _num_labels output_past suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id
""".split()  # noqa: SIM905 (forty names read better as prose)
)

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}

_MISSING = object()


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Reader:
    """Reads `config.json` key by key and remembers what was read."""

    def __init__(self, values: dict[str, Any], source: Path, inert: frozenset[str]):
        self.values, self.source, self.read = values, source, set(INERT | inert)

    def take(self, key: str, default: Any = _MISSING) -> Any:
        self.read.add(key)
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _MISSING:
            raise UserError(f"{self.source}: key {key!r} is missing; take config.json from the model's own repository")
        return default

    def size(self, key: str, default: Any = _MISSING, least: int = 1, most: int = 2**31 - 1) -> int:
        """A whole number of things."""
        value = self.take(key, default)
        if type(value) is not int or not least <= value <= most:
            self.refuse(key, value, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: Any = _MISSING, zero: bool = False) -> float:
        """Above zero, or zero where that means something."""
        value = self.take(key, default)
        if not is_number(value) or not (value > 0 or (zero and value == 0)):
            self.refuse(key, value, f"a number {'from' if zero else 'above'} 0")
        return float(value)

    def flag(self, key: str, default: Any = _MISSING) -> bool:
        value = self.take(key, default)
        if type(value) is not bool:
            self.refuse(key, value, "true or false")
        return value

    def settings(self, key: str, default: Any = None) -> dict[str, Any] | None:
        """An object of settings, or null."""
        value = self.take(key, default)
        if value is not None and type(value) is not dict:
            self.refuse(key, value, "an object of settings")
        return value

    def each(self, key: str, default: list[Any], kind: type) -> list[Any]:
        """A list of values of one type."""
        value = self.take(key, default)
        if type(value) is not list or any(type(item) is not kind for item in value):
            self.refuse(key, value, f"a list of {kind.__name__}")
        return value

    def refuse(self, key: str, value: Any, wanted: str) -> NoReturn:
        raise UserError(f"{self.source}: {key} is {short(value)}; it must be {wanted}")

    def require(self, key: str, allowed: tuple[Any, ...], default: Any) -> None:
        value = self.take(key, default)
        if value not in allowed:
            raise UserError(f"{self.source}: {key}={short(value)} is not supported; supported: {list(allowed)}")

    def activation(self, key: str) -> str:
        self.require(key, tuple(ACTIVATIONS), "silu")
        return ACTIVATIONS[self.values.get(key) or "silu"]

    def finish(self) -> None:
        unread = sorted(key for key, value in self.values.items() if key not in self.read and value is not None)
        if unread:
            raise UserError(
                f"{self.source}: unknown keys {unread}; the decoder would ignore them, so the model is refused. "
                "Remove them if they are inert"
            )


# What is read so far -> what a part of `config.json` adds to it.
Read = Callable[[Reader, dict[str, Any]], dict[str, Any]]
