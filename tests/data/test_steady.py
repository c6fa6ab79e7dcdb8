"""Templates that show the last reply in a way of its own: every reply is shown alike, and as `data.thinking` asks."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_encode import make_encoder
from test_template import CHATML
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from e2p_jax.config import Thinking
from e2p_jax.data.encode import Encoder
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError

Make = Callable[..., PreTrainedTokenizerFast]

# In the ways of published models. Told not to think, and thoughts on the last reply alone:
SWITCHED = """\
{%- for m in messages -%}
    {{- '<|im_start|>' + m['role'] + '\\n' -}}
    {%- if m['role'] == 'assistant' and loop.last -%}
        {{- '<think>\\n' + (m['reasoning_content'] or '') + '\\n</think>\\n\\n' -}}
    {%- endif -%}
    {{- m['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""
# A generation prompt that makes the model think, thoughts cut out of what was said:
OPENED = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|im_start|>' + m['content'] }}\
{% else %}{{ '<|im_end|>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}\
{{ '<|im_end|><think>\\n' if add_generation_prompt }}"""
# An end of text after all:
ENDED = """{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|eot_id|>\\n' }}{% endfor %}\
{{ '<|assistant|>\\n' if add_generation_prompt else eos_token }}"""
# The end of a turn is written when the next one comes, or is how the next one begins:
LATE = """{{ bos_token }}{% for m in messages %}{{ '' if loop.first else '<|im_end|>\\n' }}\
{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}{% endfor %}\
{{ '<|im_end|>\\n<|im_start|>assistant\\n' if add_generation_prompt }}"""
HEADED = """{% for m in messages %}{{ ('<|eot_id|>' if m['role'] == 'user' else '<|im_start|>') + '\\n' }}\
{{ m['content'] }}{% endfor %}{{ '<|im_start|>\\n' if add_generation_prompt }}"""

EMPTY = "<think>\n\n</think>\n\n"
TURN = "<|im_start|>{}\n{}<|im_end|>\n"
# Targets in double brackets.
SHOWN: dict[str, tuple[str, dict[Thinking, str]]] = {
    "switched": (
        SWITCHED,
        {
            mode: f"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{first}<|im_end|>]]\n"
            f"<|im_start|>user\npets?<|im_end|>\n<|im_start|>assistant\n{last}<|im_end|>]]\n"
            for mode, first, last in (
                ("auto", f"{EMPTY}[[hello", f"{EMPTY}[[a dog."),
                ("empty", f"{EMPTY}[[hello", f"{EMPTY}[[a dog."),
                ("none", "[[hello", "[[a dog."),
                ("full", f"[[{EMPTY}hello", "[[<think>\nlet me see\n</think>\n\na dog."),
            )
        },
    ),
    "opened": (
        OPENED,
        {
            mode: f"<s><|im_start|>hi<|im_end|>{first}</s>]]<|im_start|>pets?<|im_end|>{last}</s>]]"
            for mode, first, last in (
                ("auto", f"{EMPTY}[[hello", f"{EMPTY}[[a dog."),
                ("empty", f"{EMPTY}[[hello", f"{EMPTY}[[a dog."),
                ("none", "[[hello", "[[a dog."),
                ("full", "<think>\n[[\n</think>\n\nhello", "<think>\n[[let me see\n</think>\n\na dog."),
            )
        },
    ),
    "ended": (
        ENDED,
        dict.fromkeys(
            ("auto", "none", "empty"),
            "<|user|>\nhi<|eot_id|>\n<|assistant|>\n[[hello<|eot_id|>]]\n"
            "<|user|>\npets?<|eot_id|>\n<|assistant|>\n[[a dog.<|eot_id|>]]\n</s>",
        ),
    ),
    "late": (
        LATE,
        {
            "auto": "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[[hello<|im_end|>]]\n"
            "<|im_start|>user\npets?<|im_end|>\n<|im_start|>assistant\n[[a dog.<|im_end|>]]"
        },
    ),
    "headed": (
        HEADED,
        {"auto": "<|eot_id|>\nhi<|im_start|>\n[[hello<|eot_id|>]]\npets?<|im_start|>\n[[a dog.<|eot_id|>]]"},
    ),
}
CASES = [(style, mode) for style, (_, shown) in SHOWN.items() for mode in shown]


def thinking_tokenizer(make: Make, style: str) -> PreTrainedTokenizerFast:
    tokenizer = make(chat_template=SHOWN[style][0])
    tokenizer.add_tokens([AddedToken(f"<{tag}>", normalized=False) for tag in ("think", "/think", "|user|")])
    if style == "headed":  # as its config.json would say
        tokenizer.eos_token = "<|eot_id|>"
    return tokenizer


def thoughtful(talk: Any) -> Record:
    record = talk("hi", "hello", "pets?", "a dog.")
    last = record.messages[-1] | {"reasoning_content": "\nlet me see\n"}
    return dataclasses.replace(record, messages=(*record.messages[:-1], last))


def marked(encoder: Encoder, record: Record) -> str:
    """What the run's template makes of it in transformers, targets in double brackets."""
    kept = encoder.fit(record, ["none"]).record
    out: Any = encoder.tokenizer.apply_chat_template(
        list(kept.messages), chat_template=encoder.template, return_dict=True, return_assistant_tokens_mask=True
    )
    example = encoder.encode(record, "none")
    assert out["input_ids"] == example.tokens.tolist()
    assert out["assistant_masks"] == example.is_target.astype(int).tolist()
    runs = [""]
    for place, token in enumerate(out["input_ids"]):
        if place and example.is_target[place] != example.is_target[place - 1]:
            runs.append("")
        runs[-1] += str(encoder.tokenizer.decode([token]))
    return "".join(f"[[{run}]]" if number % 2 else run for number, run in enumerate(runs))


@pytest.mark.parametrize(("style", "mode"), CASES)
def test_every_reply_is_shown_alike(make_tokenizer: Make, talk: Any, style: str, mode: Thinking) -> None:
    """To training, to generation and by the exported template, with the thinking block that the config asks for."""
    encoder = make_encoder(thinking_tokenizer(make_tokenizer, style), thinking=mode)
    record, shown = thoughtful(talk), SHOWN[style][1][mode]
    assert marked(encoder, record) == shown
    for count in (1, 3):
        prompt = encoder.encode_prompt(dataclasses.replace(record, messages=record.messages[:count]), "e2p")
        begins = shown.replace("[[", "\0").split("\0")[: (count + 1) // 2]
        said = np.delete(prompt.tokens, prompt.slot_starts)
        assert encoder.tokenizer.decode(said) == "".join(begins).replace("]]", "")
    (note,) = encoder.notes
    assert note.startswith("made-here: chat template: every reply is shown") and "\n" not in note


@pytest.mark.parametrize(("style", "mode"), CASES)
def test_a_reply_opens_behind_its_prompt_as_in_training(
    make_tokenizer: Make, talk: Any, style: str, mode: Thinking
) -> None:
    """With its empty thoughts, where they are learned; whatever was asked, and whatever its text would end."""
    encoder, reply = make_encoder(thinking_tokenizer(make_tokenizer, style), thinking=mode), "a </s> dog.<|im_end|>"
    for asked in (("hi",), ("hi", "hello", "pets?")):
        whole = encoder.encode(talk(*asked, reply), "none").tokens.tolist()
        begins = [*encoder.encode_prompt(talk(*asked), "none").tokens.tolist(), *encoder.opening(reply, "a title")]
        assert begins == whole[: len(begins)] and whole[len(begins)] in encoder.stops


@pytest.mark.parametrize(("style", "mode"), CASES)
def test_an_exported_template_is_taken_as_it_is(
    make_tokenizer: Make, talk: Any, tmp_path: Path, style: str, mode: Thinking
) -> None:
    """By a tokenizer that has it, as clients of an export do, and from a file, as an imported run does."""
    tokenizer = thinking_tokenizer(make_tokenizer, style)
    encoder = make_encoder(tokenizer, thinking=mode)
    path = tmp_path / "chat_template.jinja"
    path.write_text(encoder.template)
    tokenizer.chat_template = encoder.template
    for chosen in ("auto", str(path)):
        again = make_encoder(tokenizer, thinking=mode, chat_template=chosen)
        assert again.template == encoder.template and again.stops == encoder.stops
        assert marked(again, thoughtful(talk)) == SHOWN[style][1][mode]


@pytest.mark.parametrize("style", ["switched", "opened", "ended"])
def test_what_is_stable_is_as_the_tokenizers_own_template_has_it(make_tokenizer: Make, talk: Any, style: str) -> None:
    """Prompts of a question alone, with the template's own switch; without a block, all but for what opens one."""
    tokenizer = thinking_tokenizer(make_tokenizer, style)
    for turns in (("hi",), ("hi", "hello", "pets?")):
        messages = list(talk(*turns).messages)
        own = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        for mode in ("none", "full") if style != "ended" else ("auto",):
            ours = make_encoder(tokenizer, thinking=mode).encode_prompt(talk(*turns), "none")
            if mode != "full" or len(turns) == 1:
                expected = own.removesuffix("<think>\n") if mode == "none" else own
                assert tokenizer.decode(ours.tokens) == expected
    told = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    if style == "switched":
        assert tokenizer.decode(make_encoder(tokenizer).encode_prompt(talk("hi"), "none").tokens) == told


def test_templates_that_are_steady_are_left_as_they_are(make_tokenizer: Make, talk: Any) -> None:
    """Of runs that there are, the template stays what it was, whatever `data.thinking` says."""
    first, *others = (
        make_encoder(make_tokenizer(chat_template=CHATML), thinking=mode) for mode in ("auto", "none", "empty")
    )
    assert all(other.template == first.template for other in others) and not first.notes
    with pytest.raises(UserError, match=r"made-here: data\.thinking=full, but its chat template shows no thoughts"):
        make_encoder(make_tokenizer(chat_template=CHATML), thinking="full")


def test_thoughts_are_left_out_unless_they_are_asked_for(make_tokenizer: Make, talk: Any) -> None:
    """And are counted where they are learned."""
    for mode, words in (("auto", 3), ("full", 6)):
        encoder = make_encoder(thinking_tokenizer(make_tokenizer, "switched"), thinking=mode)
        kept = encoder.fit(thoughtful(talk), ["none"]).record
        assert kept.reply_words == words
        assert ("reasoning_content" in kept.messages[-1]) == (mode == "full")
    assert encoder.answer("<think>\nlet me see\n</think>\n\na dog.") == "a dog." == encoder.answer("a dog.")
    assert make_encoder(make_tokenizer()).answer("a</think>b") == "a</think>b"


def test_a_reply_that_the_template_cuts_is_refused(make_tokenizer: Make, talk: Any) -> None:
    """Where `</think>` is no token, it stays in the text, and a template that cuts thoughts out cuts the reply."""
    encoder = make_encoder(make_tokenizer(chat_template=OPENED))
    with pytest.raises(UserError, match=r"talk\.jsonl:1: .*it leaves out part of a reply"):
        encoder.encode(talk("hi", "well</think>hello", "so", "yes"), "none")
