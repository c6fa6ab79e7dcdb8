"""Generation markers: which template a run uses, and what it marks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from e2p_jax.config import Config, PrefixConfig
from e2p_jax.data.encode import Encoder
from e2p_jax.data.template import PLAIN, choose_template
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError

DATE = "2024-07-26"

# In the styles of published models: no markers anywhere.
CHATML = """\
{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' -}}
{%- endif -%}
{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
# Line breaks outside of the tags, a line break after every turn, and one in front of everything.
LITERAL = """

{% for message in messages %}
{{ '<|' + message['role'] + '|>' }}
{{ message['content'] + eos_token }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
"""
# No generation prompt: the user's turn ends where the reply begins.
BRACKETS = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}\
{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}\
{{ ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('no system turns') }}{% endif %}{% endfor %}"""

# Thoughts are cut out of all assistant turns but the last.
STRIPS_THOUGHTS = CHATML.replace(
    "message['content']", "(message['content'] if loop.last else message['content'].split('</think>')[-1])"
)
# The system message wanders to the last user turn.
WANDERS = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}\
{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m['role'] == 'user' %}\
{{ '[INST] ' + (system + ' ' if system is defined and (loop.last or loop.index == messages | length - 1) else '') }}\
{{ m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"""

Pieces = list[tuple[str, bool]]


def chatml(messages: list[dict[str, str]]) -> Pieces:
    pieces: Pieces = [] if messages[0]["role"] == "system" else [("<|im_start|>system\nYou help.<|im_end|>\n", False)]
    for m in messages:
        pieces += [(f"<|im_start|>{m['role']}\n", False), (f"{m['content']}<|im_end|>", m["role"] == "assistant")]
        pieces.append(("\n", False))
    return pieces


def llama3(messages: list[dict[str, str]]) -> Pieces:
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    pieces: Pieces = [("<s>", False)]
    for m in messages:
        pieces.append((f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", False))
        pieces.append((f"{m['content']}<|eot_id|>", m["role"] == "assistant"))
    return pieces


def literal(messages: list[dict[str, str]]) -> Pieces:
    pieces: Pieces = [("\n\n", False)]
    for m in messages:
        pieces += [(f"<|{m['role']}|>\n", False), (f"{m['content']}</s>", m["role"] == "assistant"), ("\n", False)]
    return pieces


def brackets(messages: list[dict[str, str]]) -> Pieces:
    texts = {"user": "[INST] {} [/INST]", "assistant": " {}</s>"}
    return [("<s>", False), *((texts[m["role"]].format(m["content"]), m["role"] == "assistant") for m in messages)]


def plain(messages: list[dict[str, str]]) -> Pieces:
    pieces: Pieces = [("<s>", False)]
    for m in messages:
        if m["role"] == "assistant":
            pieces += [("Assistant:", False), (f" {m['content']}</s>", True), ("\n", False)]
        else:
            pieces.append((f"{m['role'].capitalize()}: {m['content']}\n", False))
    return pieces


STYLES: dict[str, tuple[str | None, Callable[[list[dict[str, str]]], Pieces]]] = {
    "chatml": (CHATML, chatml),
    "llama3": (LLAMA3, llama3),
    "literal": (LITERAL, literal),
    "brackets": (BRACKETS, brackets),
    "plain": (None, plain),
}


def encode(tokenizer: PreTrainedTokenizerFast, record: Record) -> Any:
    """Token ids, targets and the rendered text under the template a run would use."""
    template = choose_template(tokenizer, "auto", DATE).source
    out = tokenizer.apply_chat_template(
        list(record.messages), chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    text = tokenizer.apply_chat_template(list(record.messages), chat_template=template, tokenize=False)
    return out["input_ids"], [bool(m) for m in out["assistant_masks"]], text


@pytest.mark.parametrize(
    ("style", "system"),
    [*((s, None) for s in STYLES), *((s, "talk like a pirate.") for s in STYLES if s != "brackets")],
)
def test_targets_are_the_reply_and_its_end_of_turn(
    make_tokenizer: Any, talk: Any, style: str, system: str | None
) -> None:
    template, pieces_of = STYLES[style]
    tokenizer = make_tokenizer(chat_template=template)
    record = talk("hi, how are you?", "good, and you?", "any pets?", "a dog.\nand a cat", "bye", system=system)
    ids, mask, text = encode(tokenizer, record)

    pieces = pieces_of(list(record.messages))
    expected = tokenizer.backend_tokenizer.encode("".join(part for part, _ in pieces), add_special_tokens=False)
    marked = [is_target for part, is_target in pieces for _ in part]
    assert text == "".join(part for part, _ in pieces)
    assert ids == expected.ids
    assert mask == [any(marked[start:end]) for start, end in expected.offsets]
    if template:  # rendering is what the tokenizer's own template gives, with and without the generation prompt
        for prompt in (False, True):
            render = {"tokenize": False, "add_generation_prompt": prompt}
            messages = list(record.messages)
            wrapped = tokenizer.apply_chat_template(
                messages, chat_template=choose_template(tokenizer, "auto", DATE).source, **render
            )
            assert wrapped == tokenizer.apply_chat_template(messages, **render)


def test_markers_of_the_tokenizers_own_are_kept(make_tokenizer: Any) -> None:
    template = PLAIN.read_text().replace("Assistant:", "Bot:").replace("{%- generation -%}", "{%generation%}")
    assert choose_template(make_tokenizer(chat_template=template), "auto", DATE).source == template


def test_conversation_that_the_template_rewrites_is_refused(make_tokenizer: Any, talk: Any) -> None:
    encoder = Encoder.from_config(Config(), make_tokenizer(chat_template=STRIPS_THOUGHTS))
    encoder.encode(talk("hi", "hello", "pets?", "<think>dog</think>a dog."), "none")
    with pytest.raises(UserError, match=r"talk\.jsonl:1: .*rewrites earlier turns.*set data\.chat_template"):
        encoder.encode(talk("hi", "<think>who?</think>hello", "pets?", "a dog."), "none")


def test_generation_prompt_that_no_reply_begins_with_is_refused(make_tokenizer: Any) -> None:
    """But for one that opens a thinking block (`test_steady.py`)."""
    opening = CHATML.replace("{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\nWell, ' }}")
    assert opening != CHATML
    with pytest.raises(UserError, match=r"made-here: .*its generation prompt is not how a reply begins") as caught:
        choose_template(make_tokenizer(chat_template=opening), "auto", DATE)
    assert "\n" not in str(caught.value)


# The system message is refused; wanders to the last user turn; is nowhere.
SYSTEMS = {
    "refused": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + BRACKETS,
    "wanders": WANDERS,
    "ignored": BRACKETS.replace("{{ raise_exception('no system turns') }}", ""),
}


@pytest.mark.parametrize("style", SYSTEMS)
def test_a_system_message_goes_where_the_template_takes_it(make_tokenizer: Any, talk: Any, style: str) -> None:
    """In front of the first user turn, a record's and the `text` condition's, slots in front of both."""
    tokenizer = make_tokenizer(chat_template=SYSTEMS[style])
    turns = ("hi", "hello", "pets?", "a dog.")
    config = Config(prefix=PrefixConfig(placement="in_chat"))
    encoder = Encoder.from_config(config, tokenizer)
    assert encoder.notes == (
        "made-here: the chat template takes no system message: it goes in front of the first user turn",
    )
    for record, condition in ((talk(*turns, system="be brief"), "none"), (talk(*turns, context=("be brief",)), "text")):
        example = encoder.encode(record, condition)
        assert (
            tokenizer.decode(example.tokens)
            == "<s>[INST] be brief\n\nhi [/INST] hello</s>[INST] pets? [/INST] a dog.</s>"
        )
    both = encoder.encode(talk(*turns, system="be brief", context=("i sing",)), "e2p+text")
    (start,) = both.slot_starts
    assert tokenizer.decode(both.tokens[:start]).rstrip() == "<s>[INST]"
    assert tokenizer.decode(both.tokens[start + 1 :]).startswith(" i sing\nbe brief\n\nhi [/INST] hello</s>")
    stock = tokenizer.apply_chat_template(
        list(talk(*turns, system="be brief").messages), chat_template=encoder.template, return_dict=True
    )
    assert stock["input_ids"] == encoder.encode(talk(*turns, system="be brief"), "none").tokens.tolist()
    with pytest.raises(UserError, match=r"talk\.jsonl:1: .*takes no system message, and there is no user turn"):
        encoder.encode(
            Record(
                "ann", (), ({"role": "system", "content": "be"}, *talk("", "x").messages[1:]), source="talk.jsonl:1"
            ),
            "none",
        )


def test_a_template_that_takes_system_messages_gets_them(make_tokenizer: Any) -> None:
    for template in (CHATML, LLAMA3, LITERAL, None):
        encoder = Encoder.from_config(Config(), make_tokenizer(chat_template=template))
        assert not encoder.structure.folds and not encoder.notes


def test_template_that_never_shows_the_reply_is_refused(make_tokenizer: Any) -> None:
    template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="cannot be given any"):
        choose_template(make_tokenizer(chat_template=template), "auto", DATE)


def test_broken_template_is_refused(make_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="cannot be given any"):
        choose_template(make_tokenizer(chat_template="{% for m in messages %}{{ m['content'] }}"), "auto", DATE)


def test_named_templates_need_a_default(make_tokenizer: Any) -> None:
    marked = PLAIN.read_text()
    tokenizer = make_tokenizer(chat_template={"default": marked, "rag": "x"})
    assert choose_template(tokenizer, "auto", DATE).source == marked
    with pytest.raises(UserError, match=r"several chat templates.*set data\.chat_template"):
        choose_template(make_tokenizer(chat_template={"rag": "x", "other": "y"}), "auto", DATE)


def test_plain_template_needs_an_end_of_turn(make_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="EOS"):
        choose_template(make_tokenizer(eos_token=None), "auto", DATE)


def test_template_file_must_have_markers(make_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer, path = make_tokenizer(chat_template=CHATML), tmp_path / "chat.jinja"
    with pytest.raises(UserError, match=r"data\.chat_template: .*chat\.jinja does not exist"):
        choose_template(tokenizer, str(path), DATE)
    path.write_text(CHATML)  # speaks of add_generation_prompt, which is no marker
    with pytest.raises(UserError, match=r"chat\.jinja: no \{% generation %\}"):
        choose_template(tokenizer, str(path), DATE)
    path.write_text(PLAIN.read_text())
    assert choose_template(tokenizer, str(path), DATE).source == PLAIN.read_text()


DATED = """\
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "01 Jan 2001" %}
    {%- endif %}
{%- endif %}
{{- bos_token + "Today: " + date_string + " (" + strftime_now('%B') + ")\\n" }}
{%- for message in messages %}
    {{- message['role'] + ': ' + message['content'] + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}
"""


@pytest.mark.parametrize("date", [DATE, "2031-01-05"])
def test_a_template_that_asks_for_the_date_gives_the_same_tokens_every_day(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast], date: str
) -> None:
    """As transformers renders it when it is told the date; nothing is left to ask for."""
    tokenizer = make_tokenizer(chat_template=DATED)
    template = choose_template(tokenizer, "auto", date).source
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    shown = {DATE: ("26 Jul 2024", "July"), "2031-01-05": ("05 Jan 2031", "January")}[date]
    theirs = DATED.replace("strftime_now('%B')", f"'{shown[1]}'")
    expected = tokenizer.apply_chat_template(messages, chat_template=theirs, tokenize=False, date_string=shown[0])
    assert tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False) == expected
    assert "strftime_now(" not in template


def test_a_date_in_an_unknown_form_is_refused(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> None:
    template = CHATML + "{% set form = '%Y' %}{{ strftime_now(form) }}"
    with pytest.raises(UserError, match=r"made-here: the chat template calls strftime_now with something else"):
        choose_template(make_tokenizer(chat_template=template), "auto", DATE)
