"""Records -> token sequences with slots and targets."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from e2p_jax.config import Condition, Config, Placement
from e2p_jax.data import control
from e2p_jax.data.conditions import FRONTS
from e2p_jax.data.structure import Kinds, Rendered, Structure, kinds_of, unused_word
from e2p_jax.data.template import choose_template, reason
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError
from e2p_jax.json_files import read_object
from e2p_jax.vectors.catalogue import Catalogue

_HARMFUL = re.compile(r"[^\w\s]|_")
_NAMES = ("role", "type", "id", "tool_call_id")


class Example(NamedTuple):
    """One conversation as one segment of n tokens, slots included."""

    tokens: np.ndarray  # [n] int32, the pad id at slots
    is_target: np.ndarray  # [n] bool: this token is predicted, from the one before it
    slot_starts: tuple[int, ...]  # the first of each K slots: one with most placements, none where nothing is in front
    user_id: str
    source: str = ""  # of its record, for errors
    items: np.ndarray = np.zeros(0, np.int32)  # [n] int32, distinct rows of the catalogue
    item_slot: int = -1  # where the first of them stands, in front of the last reply; -1 where it does not

    @property
    def answer(self) -> int:
        """The position that predicts the item in front of the last reply, or that reply's first token; the last one
        where there is no reply yet.
        """
        if self.item_slot >= 0:
            return self.item_slot - 1
        starts = np.flatnonzero(self.is_target & ~np.roll(self.is_target, 1))
        return int(starts[-1]) - 1 if len(starts) else len(self.tokens) - 1

    def slot_places(self, num_tokens: int) -> np.ndarray:
        """[G, K] int64: where the K soft tokens of the user stand, G times."""
        return np.asarray(self.slot_starts, np.int64)[:, None] + np.arange(num_tokens)[None]


class Talk(NamedTuple):
    """A conversation as the template gets it."""

    messages: list[dict[str, Any]]
    tools: tuple[dict[str, Any], ...]
    kinds: Kinds
    source: str  # of the record

    def harmless(self) -> "Talk":
        """The same without any text that could be a control token's."""
        return self._replace(messages=_harmless(self.messages), tools=tuple(_harmless(list(self.tools))))


def _harmless(value: Any) -> Any:
    if isinstance(value, str):
        return _HARMFUL.sub(".", value)
    if isinstance(value, list):
        return [_harmless(part) for part in value]
    if isinstance(value, dict):
        return {name: part if name in _NAMES else _harmless(part) for name, part in value.items()}
    return value


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
    model, tokenizer = (read_object(file, "take it from the model's own repository") for file in files)
    if "model_type" not in model or "tokenizer_class" not in tokenizer:
        return None
    asked: dict[str, Any] = {name: model[name] for name in ("model_type", "tokenizer_class") if name in model}
    return PretrainedConfig.from_dict({**asked, "name_or_path": str(directory)})


def load_tokenizer(directory: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """The backbone's own tokenizer.

    Raises:
      UserError: no fast tokenizer, or one that knows more tokens than the backbone.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, config=_bare_config(directory))
    except UserError:
        raise
    except Exception as error:  # damaged files: tokenizers raises a bare Exception, transformers whatever comes of them
        said = (str(error).splitlines() or [type(error).__name__])[0].rstrip(": ")[:200]
        raise UserError(
            f"{directory}: no usable tokenizer ({said}); needs tokenizer.json and tokenizer_config.json"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"{directory}: needs a fast tokenizer (tokenizer.json)")
    # An added token that nothing writes may lie beyond the vocabulary, like the image token of Gemma 3's text models.
    added, template = tokenizer.get_added_vocab(), control.unguarded(str(tokenizer.chat_template))
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
    structure: Structure = dataclasses.field(compare=False, repr=False)  # of the template
    controls: dict[str, int]  # text -> id of every control token
    stops: tuple[int, ...]  # ids that end a reply
    notes: tuple[str, ...]  # about the template, a line each
    warnings: tuple[str, ...]
    placement: Placement
    num_tokens: int  # K
    thoughts: bool  # are part of replies
    targets: str
    context_prompt: str
    max_length: int  # T
    too_long: str
    vocab_size: int | None  # rows of the embedding; None: not known
    catalogue: Catalogue | None = None  # whose items records may name
    item_token: bool = False  # an item stands in front of the last reply

    @classmethod
    def from_config(
        cls,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int | None = None,
        stops: Collection[int] = (),
        catalogue: Catalogue | None = None,
    ) -> "Encoder":
        """
        Args:
          catalogue: of `data.items`.
          vocab_size: rows of the backbone's embedding, where there is one.
          stops: ids that end a reply, as the backbone's directory says (`named_stops`).

        Raises:
          UserError: a template, tokenizer or placement that cannot be used.
        """
        name = str(tokenizer.name_or_path)
        data = config.data
        template, note = choose_template(tokenizer, data.chat_template, data.template_date, data.thinking, stops)
        structure = Structure(tokenizer, template, name)
        structure.check()
        written = structure.written()
        ends = {*stops, *(() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,))}
        controls = control.control_tokens(tokenizer, template, written, ends)
        late = structure.late_end(set(controls.values()))
        if late is not None and config.data.targets == "assistant":
            raise UserError(
                f"{name}: the chat template ends a reply with {late!r} only when another turn follows, so that no "
                "target would; set data.chat_template to a copy that always ends it, inside of the generation markers"
            )
        if last := structure.ends(set(controls.values())):
            ends.add(last[-1])
        if (called := structure.call_end()) is not None:
            ends.add(called)
        warnings = []
        if not last and structure.last_target() not in ends:
            warnings.append(
                f"{name}: the chat template ends a reply with nothing that stops generation: replies will run up to "
                "--max-new-tokens; set data.chat_template to a copy that ends them with the EOS token"
            )
        structure.guard(control.break_up(tokenizer, controls), data.control_text)
        notes = [note] if note else []
        if structure.folds:
            notes.append(f"{name}: the chat template takes no system message: it goes in front of the first user turn")
        encoder = cls(
            tokenizer,
            structure,
            controls,
            tuple(sorted(ends)),
            tuple(notes),
            tuple(warnings),
            config.prefix.placement,
            config.projector.num_tokens,
            data.thinking == "full",
            config.data.targets,
            config.data.context_prompt,
            config.data.seq_len,
            config.data.too_long,
            vocab_size,
            catalogue,
            config.items.token,
        )
        encoder._check_rows(np.array(sorted(written)), name)
        return encoder

    @property
    def template(self) -> str:
        """The Jinja source, with the part in front that keeps text from becoming control tokens."""
        return self.structure.guarded

    @functools.cached_property
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
        record, dropped = self._spoken(record), 0
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
        """Renders, tokenises, marks targets and opens the slots.

        Raises:
          UserError: naming the record, whatever of it cannot become tokens or targets.
        """
        talk = self._talk(record, condition)
        rendered = self._render(talk, prompt=False)
        is_target = np.ones(len(rendered.ids), bool) if self.targets == "all" else self._targets(talk, rendered)
        is_target[0] = False  # nothing but a slot can stand before it to predict it from
        return self._with_slots(talk, rendered, is_target, record, condition)

    def encode_prompt(self, record: Record, condition: Condition) -> Example:
        """The conversation up to and with the generation prompt; no targets.

        Raises:
          UserError: naming the record, whatever of it cannot become tokens.
        """
        talk = self._talk(record, condition)
        rendered = self._render(talk, prompt=True)
        return self._with_slots(talk, rendered, np.zeros(len(rendered.ids), bool), record, condition, prompt=True)

    def opening(self, reply: str, source: str) -> list[int]:
        """The tokens of a reply, short of what ends it: the same to any question, or its targets would be wrong.

        Args:
          source: of the reply, for errors.

        Raises:
          UserError: naming the source, whatever of it cannot become tokens.
        """
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": reply}]
        talk = Talk(messages, (), kinds_of(messages), source)
        rendered = self._render(talk, prompt=False)
        tokens = rendered.ids[self._targets(talk, rendered)].tolist()
        return tokens[: next((n for n, token in enumerate(tokens) if token in self.stops), len(tokens))]

    def answer(self, reply: str) -> str:
        """A generated reply without its thoughts."""
        end = self.structure.thoughts_end if self.thoughts else ""
        return reply.rpartition(end)[2].strip() if end else reply

    def _spoken(self, record: Record) -> Record:
        """The record without thoughts, where they are no part of replies."""
        if self.thoughts or not any("reasoning_content" in message for message in record.messages):
            return record
        kept = [{k: v for k, v in message.items() if k != "reasoning_content"} for message in record.messages]
        return dataclasses.replace(record, messages=tuple(kept))

    def _talk(self, record: Record, condition: Condition) -> "Talk":
        """The record's messages, with its context in the system message where the condition asks for it."""
        messages = [dict(message) for message in self._spoken(record).messages]
        messages = [self.structure.calling.write(m) if "tool_calls" in m else m for m in messages]
        if FRONTS[condition].context and record.context:
            context = self.context_prompt.replace("{context}", "\n".join(record.context))
            if messages and messages[0]["role"] == "system":
                messages[0]["content"] = f"{context}\n{messages[0]['content']}"
            else:
                messages.insert(0, {"role": "system", "content": context})
        return Talk(messages, record.tools, kinds_of(messages, record.tools), record.source)

    def _with_slots(
        self,
        talk: "Talk",
        rendered: Rendered,
        is_target: np.ndarray,
        record: Record,
        condition: Condition,
        *,
        prompt: bool = False,
    ) -> Example:
        """The example of a conversation, its slots opened where the condition has a vector."""
        has_slots = FRONTS[condition].vector is not None
        starts = self._slot_starts(talk, rendered, prompt=prompt) if has_slots else []
        starts = [start + number * self.num_tokens for number, start in enumerate(starts)]
        is_text = np.ones(len(rendered.ids) + len(starts) * self.num_tokens, bool)
        for start in starts:
            is_text[start : start + self.num_tokens] = False
        tokens, targets = np.full(len(is_text), self.pad_id, np.int32), np.zeros(len(is_text), bool)
        tokens[is_text], targets[is_text] = rendered.ids, is_target
        items = np.zeros(0, np.int32)
        if self.catalogue is not None and record.items:
            items = self.catalogue.rows(record.items)
        whole = Example(tokens, targets, tuple(starts), record.user_id, record.source, items[items >= 0])
        if not self.item_token or not targets.any() or not len(items) or items[0] < 0:
            return whole
        place = whole.answer + 1
        tokens, targets = np.insert(tokens, place, self.pad_id), np.insert(targets, place, False)
        return whole._replace(tokens=tokens, is_target=targets, item_slot=place)

    def _slot_starts(self, talk: "Talk", rendered: Rendered, *, prompt: bool) -> list[int]:
        """Indices, in the tokens without slots, before which the soft tokens stand.

        Raises:
          UserError: no user turn for `in_chat`, or one whose place depends on its text; a reply whose opening is not
            found, for `before_reply`.
        """
        if self.placement == "before_bos":
            return [0]
        if self.placement == "after_bos":
            return [1]
        if self.placement == "before_reply":  # never in front of the first token, where attention sinks
            return [max(1, rendered.token_at(place)) for place in self._openings(talk, rendered, prompt=prompt)]
        # What the first user turn begins with: a system message, if it goes there.
        opens = ("system", "user") if self.structure.folds else ("user",)
        first = next((n for n, message in enumerate(talk.messages) if message["role"] in opens), None)
        if first is None:
            raise UserError(f"{talk.source}: prefix.placement=in_chat: the conversation has no user turn")
        # Render once more with a word that is nowhere else in place of that text; all before it is the same.
        word = unused_word([rendered.text])
        marked = [dict(m, content=word) if n == first else m for n, m in enumerate(talk.messages)]
        text = self._rendered(talk._replace(messages=marked), prompt=prompt).text
        place = text.find(word)
        if text.count(word) != 1 or rendered.text[:place] != text[:place]:
            raise UserError(
                f"{talk.source}: prefix.placement=in_chat: what the chat template writes before the first user turn "
                "depends on its text; use after_bos"
            )
        return [rendered.token_at(place)]

    def _openings(self, talk: "Talk", rendered: Rendered, *, prompt: bool) -> list[int]:
        """The character at which each reply's header begins, that of the reply asked for included."""
        tools = talk.kinds.count("tools")
        turns = [n + tools for n, message in enumerate(talk.messages) if message["role"] == "assistant"]
        spans = rendered.spans
        begins = [first for first, _ in spans]
        if len(begins) != len(turns):  # parts of one reply may be marked by themselves
            begins = [begin for n, begin in enumerate(begins) if not n or begin != spans[n - 1][1]]
        if prompt:
            turns, begins = [*turns, len(talk.kinds)], [*begins, len(rendered.text)]
        openers = [self.structure.opener(talk.kinds[:turn]) for turn in turns]
        if len(begins) != len(turns) or not all(
            rendered.text[:begin].endswith(opener) for begin, opener in zip(begins, openers, strict=True)
        ):
            raise UserError(
                f"{talk.source}: prefix.placement=before_reply: the chat template does not open every reply of this "
                "conversation as it opens one that is asked for; use after_bos"
            )
        return [begin - len(opener) for begin, opener in zip(begins, openers, strict=True)]

    def _targets(self, talk: "Talk", rendered: Rendered) -> np.ndarray:
        """[n] bool: the tokens between generation markers, as `return_assistant_tokens_mask` has them."""
        is_target = np.zeros(len(rendered.ids), bool)
        for first, last in rendered.spans:
            is_target |= (rendered.offsets[:, 0] < last) & (rendered.offsets[:, 1] > first)
        if not is_target.any():
            raise UserError(f"{talk.source}: the chat template marks no assistant text in this conversation")
        fault = self.structure.fault(talk.kinds)
        if fault is not None:
            raise UserError(
                f"{talk.source}: the chat template would give this conversation wrong targets ({fault}); change the "
                "record or set data.chat_template"
            )
        return is_target

    def _render(self, talk: "Talk", *, prompt: bool) -> Rendered:
        """Text and tokens, none of which is a control token that the template did not write."""
        rendered = self._rendered(talk, prompt=prompt)
        if not len(rendered.ids):
            raise UserError(f"{talk.source}: the chat template makes nothing of this; set data.chat_template")
        self._check_rows(rendered.ids, talk.source)
        found = self._control_ids(rendered.ids)
        shape = self.structure.find_shape(talk.kinds, prompt)
        if shape is not None and shape.unseen:
            raise UserError(
                f"{talk.source}: the chat template does not show {shape.unseen}; take that out of the record, or set "
                "data.chat_template to one that does"
            )
        if shape is not None and found == self._control_ids(shape.rendered.ids):
            return rendered
        # What a template writes may depend on the text a little: the same without anything that could be a token's.
        expected = self._control_ids(self._rendered(talk.harmless(), prompt=prompt).ids)
        if found != expected:
            pairs = itertools.zip_longest(found, expected)
            extra = next(ours or theirs for ours, theirs in pairs if ours != theirs)
            raise UserError(
                f"{talk.source}: the text of a message would become, or swallow, the control token "
                f"{self.tokenizer.convert_ids_to_tokens(extra)!r}; take it out of the text"
            )
        return rendered

    def _rendered(self, talk: "Talk", *, prompt: bool) -> Rendered:
        try:
            return self.structure.render(talk.messages, talk.tools, prompt=prompt)
        except Exception as error:  # whatever a template may raise
            begins = (
                ", which begins with a reply" if talk.messages[:1] and talk.messages[0]["role"] == "assistant" else ""
            )
            raise UserError(
                f"{talk.source}: the chat template refuses this conversation{begins} ({reason(error)}); "
                "change the record or set data.chat_template"
            ) from error

    def _control_ids(self, ids: np.ndarray) -> list[int]:
        return ids[self._is_counted[np.minimum(ids, len(self._is_counted) - 1)]].tolist()

    @functools.cached_property
    def _is_counted(self) -> np.ndarray:
        """[largest counted id + 2] bool; its last entry stands for all ids beyond."""
        ids = list(control.counted(self.tokenizer, self.controls))
        is_counted = np.zeros(max(ids, default=-1) + 2, bool)
        is_counted[ids] = True
        return is_counted

    def _check_rows(self, ids: np.ndarray, source: str) -> None:
        if self.vocab_size is not None and (beyond := ids[ids >= self.vocab_size]).size:
            raise UserError(
                f"{source}: the token {self.tokenizer.convert_ids_to_tokens(int(beyond[0]))!r} has id {beyond[0]}, but "
                f"the backbone's embedding has {self.vocab_size} rows; take it out of the text, or out of the tokenizer"
            )
