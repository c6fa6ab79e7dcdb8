"""Reads a Hugging Face `config.json` key by key: what is asked for is checked, what nobody asked for is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from e2p_jax.errors import UserError
from e2p_jax.json_files import is_number

# Keys that change nothing in the forward pass. A table, and not what the installed transformers happens to define: what
# a model means must not depend on that. A test holds it against what transformers' own base config defines or drops.
INERT = frozenset(
    """
    architectures model_type torch_dtype dtype transformers_version _name_or_path _model_name_or_path name_or_path
    _commit_hash _from_model_config internal_version auto_map tokenizer_class prefix transformers.js_config
    is_llama_config base_model_tp_plan output_hidden_states output_attentions return_dict use_return_dict
    torchscript use_bfloat16 tf_legacy_loss tie_encoder_decoder cross_attention_hidden_size chunk_size_feed_forward
    attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal
    _flash_attn_2_enabled use_flash_attn experts_implementation _experts_implementation_internal
    pretraining_tp gradient_checkpointing

    initializer_range initializer_factor neftune_noise_alpha problem_type finetuning_task task_specific_params
    id2label label2id num_labels _num_labels classifier_dropout

    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id
    use_cache cache_implementation output_past output_scores return_dict_in_generate num_return_sequences
    max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams num_beam_groups
    temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff penalty_alpha
    repetition_penalty encoder_repetition_penalty length_penalty diversity_penalty exponential_decay_length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids forced_bos_token_id forced_eos_token_id
    suppress_tokens begin_suppress_tokens remove_invalid_values
    num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind
    target_lookbehind
    """.split()  # noqa: SIM905 (a hundred names read better as prose)
)
# Keys of a kind, by how they begin: written by those who publish a model again.
INERT_STARTS = ("unsloth_",)

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "relu2": "relu2"} | dict.fromkeys(
    ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh"
)

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

    def finish(self, own: dict[str, Any]) -> list[str]:
        """Holds what nobody has read against what the family does anyway.

        Args:
          own: key -> the value that says it.

        Returns:
          The unknown keys.

        Raises:
          UserError: another value.
        """
        unread = {
            key: value
            for key, value in self.values.items()
            if key not in self.read and value is not None and not key.startswith(INERT_STARTS)
        }
        for key in unread.keys() & own.keys():
            if unread[key] != own[key]:
                raise UserError(
                    f"{self.source}: {key}={short(unread[key])} is not supported; supported here: {short(own[key])}"
                )
        return sorted(unread.keys() - own.keys())


# What is read so far -> what a part of `config.json` adds to it.
Read = Callable[[Reader, dict[str, Any]], dict[str, Any]]
