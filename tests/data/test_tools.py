"""Tools, calls, what tools say, thoughts: shown where the template takes them, else an error says what is not."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_control import counts
from test_encode import make_encoder
from test_slots import in_model
from test_template import CHATML
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from e2p_jax.data.encode import Encoder
from e2p_jax.datasets.records import Record, from_json
from e2p_jax.errors import UserError
from e2p_jax.export.slot import reply_opening

Make = Callable[..., PreTrainedTokenizerFast]

# In the way of published models: tools in the system turn, calls after the text of a reply, answers in a user's turn.
CALLS = """\
{%- if tools -%}{{- '<|im_start|>system\\n' ~ (tools | tojson) ~ '<|im_end|>\\n' -}}{%- endif -%}
{%- for m in messages -%}
    {%- if m['role'] == 'tool' -%}
        {{- '<|im_start|>user\\n<tool_response>' + m['content'] + '</tool_response><|im_end|>\\n' -}}
    {%- else -%}
        {{- '<|im_start|>' + m['role'] + '\\n' -}}
        {%- if m['role'] == 'assistant' and m['reasoning_content'] is string -%}
            {{- '<think>' + m['reasoning_content'] + '</think>' -}}
        {%- endif -%}
        {{- m['content'] -}}
        {%- for call in m['tool_calls'] or () -%}
            {{- '<tool_call>' ~ call['function']['name'] ~ ' ' ~ ARGUMENTS ~ '</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt -}}
"""
OBJECT = CALLS.replace("ARGUMENTS", "(call['function']['arguments'] | tojson)")
TEXT = CALLS.replace("ARGUMENTS", "('' + call['function']['arguments'])")
LAST = OBJECT.replace("m['role'] == 'assistant' and", "loop.last and m['role'] == 'assistant' and")
TOOLS = [{"type": "function", "function": {"name": "look", "description": "tells", "parameters": {"type": "object"}}}]
MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


def tokenizer_of(make: Make, template: str) -> PreTrainedTokenizerFast:
    tokenizer = make(chat_template=template)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in MARKUP])
    return tokenizer


def call(text: str = "Oslo", name: str = "look") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": {"city": text}}}


def record(*messages: dict[str, Any], tools: Sequence[dict[str, Any]] = ()) -> Record:
    values = {"user_id": "ann", "messages": list(messages), "tools": list(tools)}
    return from_json(values, "talk.jsonl:1")


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def reply(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def weather(question: str = "rain?", said: str = "wet", answer: str = "yes.") -> Record:
    turns = (user(question), reply(None, tool_calls=[call()]), {"role": "tool", "content": said}, reply(answer))
    return record(*turns, tools=TOOLS)


def targets(encoder: Encoder, said: Record) -> str:
    example = encoder.encode(said, "none")
    return str(encoder.tokenizer.decode(example.tokens[example.is_target]))


@pytest.mark.parametrize("template", [OBJECT, TEXT, LAST], ids=["object", "text", "last"])
def test_calls_are_targets_and_what_tools_say_is_not(make_tokenizer: Make, template: str) -> None:
    """As the tokenizer's own template renders it, arguments an object or its JSON, whichever that takes."""
    tokenizer = tokenizer_of(make_tokenizer, template)
    encoder = make_encoder(tokenizer)
    said = weather()
    assert targets(encoder, said) == '<tool_call>look {"city": "Oslo"}</tool_call><|im_end|>yes.<|im_end|>'
    messages = [encoder.structure.calling.write(m) if "tool_calls" in m else m for m in said.messages]
    for count in (1, 3, 4):
        own = tokenizer.apply_chat_template(
            messages[:count], tools=TOOLS, tokenize=False, add_generation_prompt=count < 4
        )
        part = dataclasses.replace(said, messages=said.messages[:count])
        ours = encoder.encode(part, "none") if count == 4 else encoder.encode_prompt(part, "none")
        assert tokenizer.decode(ours.tokens) == own
    with_text = record(user("rain?"), reply("let me look.", tool_calls=[call(), call("Rome")]), tools=TOOLS)
    assert targets(encoder, with_text).startswith("let me look.<tool_call>look") and "Rome" in targets(
        encoder, with_text
    )
    parts = record(
        {"role": "user", "content": [{"type": "text", "text": "ra"}, {"type": "text", "text": "in?"}]}, reply("so")
    )
    whole = record(user("rain?"), reply("so"))
    assert encoder.encode(parts, "none").tokens.tolist() == encoder.encode(whole, "none").tokens.tolist()


def test_a_slot_before_every_reply_whatever_it_holds(make_tokenizer: Make) -> None:
    """Calls and thoughts included; an exported model finds them by the ids alone."""
    encoder = make_encoder(tokenizer_of(make_tokenizer, OBJECT), "before_reply", thinking="full")
    opening = reply_opening(encoder)
    thought = record(user("hi"), reply("ok", reasoning_content="hm"), user("so?"), reply("no", reasoning_content="ah"))
    for said in (weather(), thought):
        example = encoder.encode(said, "e2p")
        ids = np.delete(example.tokens, example.slot_starts).tolist()
        found = in_model(ids, "before_reply", reply_opening=opening)
        assert found == [start - n for n, start in enumerate(example.slot_starts)] and len(found) == 2
        for start in found:
            assert encoder.tokenizer.decode(ids[start:]).startswith("<|im_start|>assistant\n")


def test_replies_after_what_a_tool_says_are_shown_like_all_others(make_tokenizer: Make) -> None:
    """Under a template that opens every reply since the last question with a block, as Qwen3.5's does."""
    since = LAST.replace(
        "{%- for m", "{%- set last = messages | selectattr('role', 'equalto', 'user') | list | last -%}{%- for m", 1
    )
    since = since.replace("{%- if tools -%}", "{%- set ns = namespace(since=false) -%}{%- if tools -%}", 1)
    since = since.replace(
        "{%- if m['role'] == 'tool' -%}",
        "{%- if m == last -%}{%- set ns.since = true -%}{%- endif -%}{%- if m['role'] == 'tool' -%}",
    )
    since = since.replace(
        "{{- m['content'] -}}",
        "{{- ('<think></think>' if ns.since and m['role'] == 'assistant' else '') + m['content'] -}}",
    )
    encoder = make_encoder(tokenizer_of(make_tokenizer, since))
    more = dataclasses.replace(weather(), messages=(*weather().messages, user("sure?"), reply("no")))
    for said in (weather(), more):
        text = str(encoder.tokenizer.decode(encoder.encode(said, "none").tokens))
        assert text.count("<think></think>") == sum(m["role"] == "assistant" for m in said.messages)
        assert targets(encoder, said).startswith('<tool_call>look {"city": "Oslo"}</tool_call><|im_end|>yes.<|im_end|>')
        for count in (3, 1):
            asked = encoder.encode_prompt(dataclasses.replace(said, messages=said.messages[:count]), "none")
            assert text.startswith(str(encoder.tokenizer.decode(asked.tokens)))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (record(user("hi"), reply("ok"), tools=TOOLS), "does not show `tools`; take that out"),
        (record(user("hi"), reply(None, tool_calls=[call()])), "does not show tool calls; take that out"),
        (record(user("hi"), reply("ok", tool_calls=[call()])), "does not show tool calls; take that out"),
        (
            record(user("hi"), {"role": "tool", "content": "wet"}, reply("ok")),
            r"does not show what a tool says \(role tool\); take that out",
        ),
    ],
    ids=["tools", "calls", "calls beside text", "role"],
)
def test_what_the_template_does_not_show_is_refused(make_tokenizer: Make, said: Record, words: str) -> None:
    silent = CHATML.replace(
        "{% for message in messages %}", "{% for message in messages if message['role'] != 'tool' %}"
    )
    assert silent != CHATML
    encoder = make_encoder(make_tokenizer(chat_template=silent))
    encoder.encode(record(user("hi"), reply("ok")), "none")
    with pytest.raises(UserError, match=rf"talk\.jsonl:1: the chat template {words}") as caught:
        encoder.encode(said, "none")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="does not show"):
        encoder.encode_prompt(dataclasses.replace(said, messages=(*said.messages, user("so?"))), "none")


def test_text_that_calls_hide_is_refused(make_tokenizer: Make) -> None:
    """Llama 3.1's template leaves it out."""
    hides = OBJECT.replace("{{- m['content'] -}}", "{{- m['content'] if not m['tool_calls'] -}}")
    encoder = make_encoder(tokenizer_of(make_tokenizer, hides))
    encoder.encode(weather(), "none")
    with pytest.raises(UserError, match="does not show text beside tool calls; take that out"):
        encoder.encode(record(user("hi"), reply("ok", tool_calls=[call()])), "none")


def test_thoughts_that_stay_where_they_are_are_learned_as_they_are(make_tokenizer: Make) -> None:
    """A template that is steady with thoughts, and one that is not."""
    said = record(user("hi"), reply("ok", reasoning_content="hm"), user("so?"), reply("yes", reasoning_content="well"))
    for template in (OBJECT, LAST):
        encoder = make_encoder(tokenizer_of(make_tokenizer, template), thinking="full")
        assert targets(encoder, said) == "<think>hm</think>ok<|im_end|><think>well</think>yes<|im_end|>"
        assert encoder.answer("<think>hm</think>ok") == "ok"
        assert targets(make_encoder(tokenizer_of(make_tokenizer, template)), said) == "ok<|im_end|>yes<|im_end|>"


_HOSTILE = st.lists(
    st.sampled_from(
        [*MARKUP, "<|im_start|>", "<|im_end|>", "</s>", "<s>", "<|im_", "a", " ", "\n", '"', "'", "\\", "{", "é"]
    ),
    min_size=1,
    max_size=6,
).map("".join)


@pytest.mark.parametrize("template", [OBJECT, TEXT, LAST], ids=["object", "text", "last"])
def test_text_stays_text_in_tools_calls_and_thoughts(make_tokenizer: Make, template: str) -> None:
    """Whatever they hold, no token is a control token that would not be there with harmless words."""
    tokenizer = tokenizer_of(make_tokenizer, template)
    encoder = make_encoder(tokenizer, "in_chat", thinking="full")

    def encoded(words: Sequence[str]) -> list[dict[str, int]]:
        parameters = {"properties": {words[2]: {"enum": [words[3]]}}}
        tool = {"name": words[0], "description": words[1], "parameters": parameters}
        made = {"function": {"name": words[4], "arguments": {words[5]: [{"x": words[6]}]}}}
        turns = (
            user(f"q{words[0]}"),
            reply(f"r{words[1]}", reasoning_content=f"t{words[2]}", tool_calls=[made]),
            {"role": "tool", "content": words[3]},
            reply(f"a{words[6]}", reasoning_content=f"t{words[5]}"),
        )
        example = encoder.encode(record(*turns, tools=[{"type": "function", "function": tool}]), "e2p")
        return [counts(tokenizer, ids) for ids in (example.tokens, example.tokens[example.is_target])]

    honest = encoded("abcdefg")

    @settings(max_examples=40)
    @given(texts=st.lists(_HOSTILE, min_size=7, max_size=7))
    def hostile_texts_give_the_same(texts: list[str]) -> None:
        assert encoded(texts) == honest

    hostile_texts_give_the_same()
