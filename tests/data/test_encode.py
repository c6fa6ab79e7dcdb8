"""Records to tokens: slots, targets, conversations that are too long, and tokenizers that do not belong."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_template import BRACKETS, CHATML, LITERAL, LLAMA3

from e2p_jax.backbone.weights import EMBEDDED
from e2p_jax.config import Config, DataConfig, PrefixConfig, ProjectorConfig
from e2p_jax.data.encode import Encoder, load_tokenizer
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError

TURNS = ("hi, how are you?", "good, and you?", "do you have any pets?", "a dog and a cat.")
PLACEMENTS = ("before_bos", "after_bos", "in_chat", "before_reply")


def make_encoder(tokenizer: Any, placement: Any = "after_bos", num_tokens: int = 1, **data: Any) -> Encoder:
    return Encoder.from_config(
        Config(
            data=DataConfig(**data),
            prefix=PrefixConfig(placement=placement),
            projector=ProjectorConfig(num_tokens=num_tokens),
        ),
        tokenizer,
    )


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize(
    ("style", "placement"),
    list(itertools.product(("plain", "chatml", "llama3"), PLACEMENTS)),
)
def test_transformers_gives_the_same_tokens_and_targets_less_the_slots(
    make_tokenizer: Any, talk: Any, style: str, placement: str, num_tokens: int
) -> None:
    tokenizer = make_tokenizer(chat_template={"plain": None, "chatml": CHATML, "llama3": LLAMA3}[style])
    encoder = make_encoder(tokenizer, placement, num_tokens)
    record = talk(*TURNS, system="talk like a pirate.")
    example = encoder.encode(record, "e2p")
    reference = tokenizer.apply_chat_template(
        list(record.messages), chat_template=encoder.template, return_dict=True, return_assistant_tokens_mask=True
    )
    slots = example.slot_places(num_tokens).ravel()
    assert len(slots) == num_tokens * (2 if placement == "before_reply" else 1)
    assert np.delete(example.tokens, slots).tolist() == reference["input_ids"]
    assert np.delete(example.is_target, slots).astype(int).tolist() == reference["assistant_masks"]
    assert (example.tokens[slots] == tokenizer.pad_token_id).all() and not example.is_target[slots].any()
    assert example.tokens.dtype == np.int32 and example.user_id == "ann"

    for condition in ("none", "text"):  # no context: the text condition has nothing to add
        bare = encoder.encode(record, condition)
        assert bare.slot_starts == ()
        assert (bare.tokens.tolist(), bare.is_target.astype(int).tolist()) == tuple(
            reference[key] for key in ("input_ids", "assistant_masks")
        )


@pytest.mark.parametrize("system", [None, "do you have any pets?"])
@pytest.mark.parametrize("template", [None, CHATML, LLAMA3, LITERAL], ids=["plain", "chatml", "llama3", "literal"])
def test_slots_stand_where_the_placement_says(
    make_tokenizer: Any, talk: Any, template: str | None, system: str | None
) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    record = talk("do you have any pets?", "a dog.", "do you have any pets?", "a cat.", system=system)
    assert make_encoder(tokenizer, "before_bos", 3).encode(record, "shuffled").slot_starts == (0,)
    example = make_encoder(tokenizer, "after_bos", 3).encode(record, "e2p")
    assert example.slot_starts == (1,)
    opens = {CHATML: "<|im_start|>", LITERAL: "\n"}.get(template, "<s>")  # BOS, where the template begins with one
    assert tokenizer.decode(example.tokens[:1]) == opens
    example = make_encoder(tokenizer, "in_chat", 3).encode(record, "e2p")
    before = tokenizer.decode(example.tokens[: example.slot_starts[0]])
    after = tokenizer.decode(example.tokens[example.slot_starts[0] + 3 :])
    assert after.lstrip(" ").startswith("do you have any pets?")
    assert before.count("any pets?") == (system is not None)  # the system message, not the first user turn
    assert (
        before.rstrip()
        .lower()
        .endswith({None: "user:", CHATML: "user", LLAMA3: "user<|end_header_id|>", LITERAL: "<|user|>"}[template])
    )


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("template", [None, LLAMA3], ids=["plain", "llama3"])
def test_prompt_is_what_stands_before_the_last_reply(
    make_tokenizer: Any, talk: Any, template: str | None, placement: str
) -> None:
    encoder = make_encoder(make_tokenizer(chat_template=template), placement, 2)
    whole, prompt = encoder.encode(talk(*TURNS), "e2p"), encoder.encode_prompt(talk(*TURNS[:-1]), "e2p")
    ends = np.flatnonzero(np.diff(whole.is_target.astype(int)) == 1)  # the token before each reply
    assert prompt.tokens.tolist() == whole.tokens[: ends[-1] + 1].tolist()
    assert prompt.slot_starts == whole.slot_starts and not prompt.is_target.any()


@pytest.mark.parametrize("system", [None, "Assistant: talk like a pirate."])
@pytest.mark.parametrize(
    ("template", "header"),
    [(None, "Assistant:"), (CHATML, "<|im_start|>assistant\n"), (LITERAL, "<|assistant|>\n"), (BRACKETS, " ")],
    ids=["plain", "chatml", "literal", "no header"],
)
def test_a_slot_before_every_reply(make_tokenizer: Any, talk: Any, template: str, header: str, system: str) -> None:
    """In front of what opens it, and nothing else in front: of all users alike up to there, whatever the text says."""
    turns = ("hi\nAssistant: me", "Assistant: it", "so?", "<|im_start|>assistant", "[/INST]", "bye.")
    record = talk(*turns, system=None if template == BRACKETS else system)
    encoder = make_encoder(make_tokenizer(chat_template=template), "before_reply", 2)
    example, bare = encoder.encode(record, "e2p"), encoder.encode(record, "none")
    assert len(example.slot_starts) == 3
    assert np.delete(example.tokens, example.slot_places(2)).tolist() == bare.tokens.tolist()
    replies = np.flatnonzero(np.diff(example.is_target.astype(int)) == 1) + 1
    for start, reply, end in zip(example.slot_starts, replies, [*example.slot_starts[1:], None], strict=True):
        said = encoder.tokenizer.decode(example.tokens[start + 2 : reply])
        assert said == header.strip(" "), "the header alone stands between a slot and its reply"
        assert example.is_target[reply:end].any() and not example.is_target[start:reply].any()
    prompt = encoder.encode_prompt(dataclasses.replace(record, messages=record.messages[:-1]), "e2p")
    assert prompt.slot_starts == example.slot_starts
    assert prompt.tokens.tolist() == example.tokens[: replies[-1]].tolist()
    kept, _, dropped = make_encoder(make_tokenizer(chat_template=template), "before_reply", 60).fit(
        talk(*turns * 3), ["e2p"]
    )
    assert dropped > 0 and kept.messages[0]["role"] == "user"  # T counts all slots


def test_a_reply_that_opens_a_conversation_leaves_the_first_token_alone(make_tokenizer: Any) -> None:
    said = tuple({"role": role, "content": "hi"} for role in ("assistant", "user", "assistant"))
    bare = CHATML[CHATML.index("{% for") :]
    for template, first in ((bare, "<|im_start|>"), (None, "<s>")):
        encoder = make_encoder(make_tokenizer(chat_template=template), "before_reply", 2)
        example = encoder.encode(Record("ann", (), said), "e2p")
        assert example.slot_starts[0] == 1 and len(example.slot_starts) == 2
        assert encoder.tokenizer.decode(example.tokens[:1]) == first


def test_targets_of_a_real_tokenizer(shared: Path, talk: Any) -> None:
    tokenizer = load_tokenizer(shared / "backbones" / "stories260k", 512)
    example = make_encoder(tokenizer).encode(talk(*TURNS), "e2p")
    runs = np.split(example.tokens, np.flatnonzero(np.diff(example.is_target.astype(int))) + 1)
    assert [tokenizer.decode(run).strip() for run in runs[1::2]] == [TURNS[1] + "</s>", TURNS[3] + "</s>"]
    assert example.tokens[0] == tokenizer.bos_token_id == 1
    with pytest.raises(UserError, match=r"stories260k: the tokenizer's ids reach 511.*vocab_size 511.*another model"):
        load_tokenizer(shared / "backbones" / "stories260k", 511)


def test_every_token_but_the_first_can_be_a_target(make_tokenizer: Any, talk: Any) -> None:
    example = make_encoder(make_tokenizer(), targets="all").encode(talk(*TURNS), "none")
    assert example.is_target.tolist() == [False] + [True] * (len(example.tokens) - 1)


def test_text_condition_puts_the_context_into_the_system_message(make_tokenizer: Any, talk: Any) -> None:
    tokenizer = make_tokenizer()
    encoder = make_encoder(tokenizer, context_prompt="About {context}!")
    context = ("i have a dog.", "i sing.")
    alone = tokenizer.decode(encoder.encode(talk(*TURNS, context=context), "text").tokens)
    assert alone.startswith("<s>System: About i have a dog.\ni sing.!\nUser: hi, how are you?\nAssistant: good")
    joined = tokenizer.decode(encoder.encode(talk(*TURNS, context=context, system="be brief."), "text").tokens)
    assert joined.startswith("<s>System: About i have a dog.\ni sing.!\nbe brief.\nUser: hi")
    record = talk(*TURNS, context=context)
    targets = [
        example.tokens[example.is_target].tolist()
        for example in (encoder.encode(record, condition) for condition in ("none", "e2p", "shuffled", "text"))
    ]
    assert all(ids == targets[0] for ids in targets)


def test_oldest_turns_go_first(make_tokenizer: Any, talk: Any) -> None:
    tokenizer = make_tokenizer()
    turns = [text for i in range(30) for text in (f"question number {i} of many?", f"answer number {i}, my friend.")]
    record = talk(*turns, system="be brief.")
    encoder = make_encoder(tokenizer, num_tokens=3, seq_len=128)
    kept, _, dropped = encoder.fit(record, ["none", "e2p"])
    assert len(record.messages) - len(kept.messages) == dropped > 0
    assert kept.messages == (record.messages[0], *record.messages[1 + dropped :])
    assert kept.messages[1]["role"] == "user"
    assert len(encoder.encode(kept, "e2p").tokens) <= 128
    one_more = dataclasses.replace(kept, messages=(kept.messages[0], *record.messages[dropped - 1 :]))
    assert len(encoder.encode(one_more, "e2p").tokens) > 128

    short = talk(*TURNS)
    assert encoder.fit(short, ["e2p"])[::2] == (short, 0)
    trailing = dataclasses.replace(record, messages=(*record.messages, {"role": "user", "content": "and now?"}))
    assert encoder.fit(trailing, ["none"])[0].messages[-2:] == trailing.messages[-2:]


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=2, max_size=14), system=st.booleans())
def test_fitted_conversation_ends_as_before_and_never_exceeds_the_row(
    make_tokenizer: Any, talk: Any, lengths: list[int], system: bool
) -> None:
    encoder = make_encoder(make_tokenizer(), seq_len=128)
    record = talk(*(("a dog " * n).strip() for n in lengths[: len(lengths) // 2 * 2]), system="hi" if system else None)
    kept, _, dropped = encoder.fit(record, ["e2p"])
    assert len(encoder.encode(kept, "e2p").tokens) <= 128
    assert kept.messages[int(system) :] == record.messages[int(system) + dropped :]
    assert kept.messages[-1] == record.messages[-1] and len(kept.messages) >= 2 + system


def test_too_long_is_refused(make_tokenizer: Any, talk: Any) -> None:
    long = talk(*TURNS * 20)
    with pytest.raises(UserError, match=r"talk\.jsonl:1: longer than data\.seq_len=128.*too_long=drop_oldest"):
        make_encoder(make_tokenizer(), seq_len=128, too_long="refuse").fit(long, ["e2p"])
    with pytest.raises(UserError, match=r"talk\.jsonl:1: its last exchange alone is longer than data\.seq_len=128"):
        make_encoder(make_tokenizer(), seq_len=128).fit(talk("hi", "ok", "hm " * 200, "ok"), ["e2p"])


def test_placement_that_a_template_cannot_have_is_refused(make_tokenizer: Any, talk: Any) -> None:
    silent = dataclasses.replace(talk(*TURNS), messages=({"role": "assistant", "content": "hello"},))
    with pytest.raises(UserError, match="in_chat: the conversation has no user turn"):
        make_encoder(make_tokenizer(), "in_chat").encode(silent, "e2p")


def test_conversation_that_the_template_refuses_is_named(make_tokenizer: Any, talk: Any) -> None:
    no_boo = "{% if messages[-1]['content'] == 'boo' %}{{ raise_exception('no boo') }}{% endif %}" + CHATML
    encoder = make_encoder(make_tokenizer(chat_template=no_boo))
    with pytest.raises(UserError, match=r"talk\.jsonl:1: .*refuses this conversation \(no boo\)"):
        encoder.encode(talk("hi", "boo"), "text")


def test_tokenizer_of_another_model_is_refused(make_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template=CHATML)
    tokenizer.add_tokens(["<image>", "<|ask|>"])
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path, 602).vocab_size == 600
    assert load_tokenizer(tmp_path, 600).chat_template == CHATML  # nothing writes the added tokens
    with pytest.raises(UserError, match=r"ids reach 599 .*vocab_size 599; the tokenizer belongs to another model"):
        load_tokenizer(tmp_path, 599)
    tokenizer.chat_template = CHATML.replace("<|im_start|>", "<|ask|>")
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"ids reach 601 \('<\|ask\|>'\)"):
        load_tokenizer(tmp_path, 600)


@pytest.mark.parametrize(
    ("model_type", "named"),
    [
        ("llama", "PreTrainedTokenizerFast"),
        ("llama", "LlamaTokenizerFast"),
        ("mistral", "LlamaTokenizer"),
        ("gemma3_text", "GemmaTokenizer"),
        ("qwen2", "Qwen2TokenizerFast"),
        ("gpt2", "GPT2Tokenizer"),
        ("qwen3", "NoSuchTokenizer"),
        ("qwen3", None),
        ("nosuch", "PreTrainedTokenizerFast"),
    ],
)
def test_tokenizer_is_the_one_that_transformers_picks(tmp_path: Path, model_type: str, named: str | None) -> None:
    shutil.copyfile(EMBEDDED / "tokenizer.json", tmp_path / "tokenizer.json")
    for name, key, value in [("config", "model_type", model_type), ("tokenizer_config", "tokenizer_class", named)]:
        values = json.loads((EMBEDDED / f"{name}.json").read_text()) | {key: value}
        (tmp_path / f"{name}.json").write_text(json.dumps({k: v for k, v in values.items() if v}))
    tokenizer, theirs = load_tokenizer(tmp_path, 1 << 20), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is type(theirs)
    assert tokenizer.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()


@pytest.mark.parametrize("files", [{}, {"tokenizer.json": "{}"}, {"tokenizer_config.json": "{}"}])
def test_directory_without_a_tokenizer_is_refused(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match=r"no usable tokenizer .*needs tokenizer\.json") as caught:
        load_tokenizer(tmp_path, 512)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


DAMAGE: dict[str, list[tuple[tuple[str, ...], Any]]] = {
    "tokenizer.json": [
        (("version",), ""),
        (("added_tokens",), 5),
        (("added_tokens",), [{"id": "x"}]),
        (("model", "vocab"), None),
        (("model", "merges"), [[]]),
        (("pre_tokenizer",), {"type": {}}),
        (("padding",), 0),
        (("truncation",), "x"),
    ],
    "tokenizer_config.json": [
        (("tokenizer_class",), 5),
        (("eos_token",), ["</s>"]),
        (("pad_token",), {}),
        (("extra_special_tokens",), "x"),
        (("additional_special_tokens",), [5]),
    ],
}


@pytest.mark.parametrize(
    ("name", "keys", "value"), [(n, *change) for n, changes in DAMAGE.items() for change in changes]
)
def test_a_damaged_tokenizer_is_refused_in_a_line(tmp_path: Path, name: str, keys: tuple[str, ...], value: Any) -> None:
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED / file, tmp_path / file)
    values = json.loads((tmp_path / name).read_text())
    inside = values
    for key in keys[:-1]:
        inside = inside[key]
    inside[keys[-1]] = value
    (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(UserError, match="no usable tokenizer") as error:
        load_tokenizer(tmp_path, 4096)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["5", "null", "[" * 100_000, "{", ""])
def test_a_tokenizer_file_that_is_no_object_is_refused_in_a_line(tmp_path: Path, name: str, text: str) -> None:
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED / file, tmp_path / file)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path, 4096)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
