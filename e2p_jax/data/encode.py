"""Records -> token sequences with slots and targets."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from e2p_jax.config import Condition, Config, Placement
from e2p_jax.data.conditions import FRONTS
from e2p_jax.data.records import Record
from e2p_jax.data.template import choose_template
from e2p_jax.errors import UserError


class Example(NamedTuple):
    """One conversation as one segment of n tokens, slots included."""

    tokens: np.ndarray  # [n] int32, the pad id at slots
    is_target: np.ndarray  # [n] bool: this token is predicted, from the one before it
    slot_start: int  # first of the K slots, -1 where the condition has none
    user_id: str


class Fitted(NamedTuple):
    """A record cut to T tokens, and its examples."""

    record: Record
    examples: dict[Condition, Example]
    dropped_messages: int


def _bare_config(directory: Path) -> PretrainedConfig | None:
    """All that transformers asks a model's config for when the tokenizer's own names its class; None where it does not.

    Left to itself it imports the model's config class, and with that half of torch where torch is installed: 0.8 s.
    """
    files = directory / "config.json", directory / "tokenizer_config.json"
    if not all(file.is_file() for file in files):
        return None
    model, tokenizer = (json.loads(file.read_text("utf-8")) for file in files)
    if "model_type" not in model or "tokenizer_class" not in tokenizer:
        return None
    asked = {name: model[name] for name in ("model_type", "tokenizer_class") if name in model}
    return PretrainedConfig.from_dict({**asked, "name_or_path": str(directory)})


def load_tokenizer(directory: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """The backbone's own tokenizer.

    Raises:
      UserError: no fast tokenizer, or one that knows more tokens than the backbone.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, config=_bare_config(directory))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0].rstrip(": ")
        raise UserError(
            f"{directory}: no usable tokenizer ({reason}); needs tokenizer.json and tokenizer_config.json"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"{directory}: needs a fast tokenizer (tokenizer.json)")
    # An added token that nothing writes may lie beyond the vocabulary, like the image token of Gemma 3's text models.
    added, template = tokenizer.get_added_vocab(), str(tokenizer.chat_template)
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    used = {i: t for t, i in tokenizer.get_vocab().items() if t not in added or t in special or t in template}
    largest = max(used)
    if largest >= vocab_size:
        raise UserError(
            f"{directory}: the tokenizer's ids reach {largest} ({used[largest]!r}), but config.json has vocab_size "
            f"{vocab_size}; the tokenizer belongs to another model"
        )
    return tokenizer


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Turns records into examples the same way in training, evaluation, generation and export."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    placement: Placement
    num_tokens: int  # K
    targets: str
    context_prompt: str
    max_length: int  # T
    too_long: str

    @classmethod
    def from_config(cls, config: Config, tokenizer: PreTrainedTokenizerBase) -> "Encoder":
        template = choose_template(tokenizer, config.data.chat_template, config.data.template_date)
        encoder = cls(
            tokenizer,
            template,
            config.prefix.placement,
            config.projector.num_tokens,
            config.data.targets,
            config.data.context_prompt,
            config.data.seq_len,
            config.data.too_long,
        )
        if encoder.placement == "after_bos" and tokenizer.bos_token_id is None:
            raise UserError("prefix.placement=after_bos: this tokenizer has no BOS token; use before_bos or in_chat")
        return encoder

    @property
    def pad_id(self) -> int:
        for candidate in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if candidate is not None:
                return int(candidate)
        return 0

    def fit(self, record: Record, conditions: Sequence[Condition]) -> Fitted:
        """Encodes a record under several conditions, without its oldest turns where it is too long for one of them.

        All conditions lose the same turns, so that all score the same targets. The last assistant turn is never
        dropped, nor is the system message.

        Raises:
          UserError: it cannot fit, or the policy is `refuse`.
        """
        dropped = 0
        while True:
            examples = {condition: self.encode(record, condition) for condition in conditions}
            if max(len(example.tokens) for example in examples.values()) <= self.max_length:
                return Fitted(record, examples, dropped)
            if self.too_long == "refuse":
                raise UserError(
                    f"{record.source}: longer than data.seq_len={self.max_length} tokens; "
                    "raise it, or set data.too_long=drop_oldest"
                )
            system = [m for m in record.messages[:1] if m["role"] == "system"]
            turns = list(record.messages[len(system) :])
            # The next conversation that begins with a user turn.
            starts = [i for i, m in enumerate(turns) if i > 0 and m["role"] == "user"]
            shorter = next((turns[i:] for i in starts if any(m["role"] == "assistant" for m in turns[i:])), None)
            if shorter is None:
                raise UserError(
                    f"{record.source}: its last exchange alone is longer than data.seq_len={self.max_length} tokens; "
                    "raise it or shorten the text"
                )
            dropped += len(turns) - len(shorter)
            record = dataclasses.replace(record, messages=(*system, *shorter))

    def encode(self, record: Record, condition: Condition) -> Example:
        """Renders, tokenises, marks targets and opens the slots."""
        messages = self.messages(record, condition)
        encoded = self._render(messages, record.source, add_generation_prompt=False)
        tokens = np.asarray(encoded["input_ids"], np.int32)
        if self.targets == "all":
            is_target = np.ones(len(tokens), bool)
        else:
            is_target = np.asarray(encoded["assistant_masks"], bool)
        if not is_target.any():
            raise UserError(f"{record.source}: the chat template marks no assistant text in this conversation")
        is_target[0] = False  # nothing but a slot can stand before it to predict it from
        start = -1
        if FRONTS[condition].vector is not None:
            start = self.slot_start(messages, encoded)
            slots = np.full(self.num_tokens, self.pad_id, np.int32)
            tokens = np.concatenate([tokens[:start], slots, tokens[start:]])
            is_target = np.concatenate([is_target[:start], np.zeros(self.num_tokens, bool), is_target[start:]])
        return Example(tokens, is_target, start, record.user_id)

    def encode_prompt(self, record: Record, condition: Condition) -> Example:
        """The conversation up to and with the generation prompt; no targets."""
        messages = self.messages(record, condition)
        encoded = self._render(messages, record.source, add_generation_prompt=True)
        tokens, start = np.asarray(encoded["input_ids"], np.int32), -1
        if FRONTS[condition].vector is not None:
            start = self.slot_start(messages, encoded)
            tokens = np.insert(tokens, start, [self.pad_id] * self.num_tokens)
        return Example(tokens, np.zeros(len(tokens), bool), start, record.user_id)

    def messages(self, record: Record, condition: Condition) -> list[dict[str, str]]:
        """The record's messages, with its context in the system message where the condition asks for it."""
        messages = [dict(message) for message in record.messages]
        if not FRONTS[condition].context or not record.context:
            return messages
        context = self.context_prompt.replace("{context}", "\n".join(record.context))
        if messages[0]["role"] == "system":
            return [{"role": "system", "content": f"{context}\n{messages[0]['content']}"}, *messages[1:]]
        return [{"role": "system", "content": context}, *messages]

    def slot_start(self, messages: list[dict[str, str]], encoded: dict[str, Any]) -> int:
        """Index, in the tokens without slots, before which the soft tokens stand.

        Raises:
          UserError: no BOS for `after_bos`, or no user turn for `in_chat`.
        """
        if self.placement == "before_bos":
            return 0
        if self.placement == "after_bos":
            if encoded["input_ids"][0] != self.tokenizer.bos_token_id:
                raise UserError("prefix.placement=after_bos: the chat template does not begin with the BOS token")
            return 1
        first = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
        if first is None:
            raise UserError("prefix.placement=in_chat: the conversation has no user turn")
        # Render once more with a mark in place of the first user turn's text; all before the mark is the same.
        marked = [*messages[:first], {"role": "user", "content": "\ue000"}, *messages[first + 1 :]]
        text: Any = self.tokenizer.apply_chat_template(marked, chat_template=self.template, tokenize=False)
        offset = text.index("\ue000")
        return next(i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > offset)

    def _render(self, messages: list[dict[str, str]], source: str, *, add_generation_prompt: bool) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},  # `fit` sees to the length
            )
        except jinja2.TemplateError as error:
            raise UserError(
                f"{source}: the chat template refuses this conversation ({error}); "
                "change the record or set data.chat_template"
            ) from error
