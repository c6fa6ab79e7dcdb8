"""What a template writes around messages: targets in every shape of a conversation, stop tokens, rows, an end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_encode import TURNS, make_encoder
from test_template import BRACKETS, CHATML, LLAMA3
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from e2p_jax.config import Config
from e2p_jax.data import bounded
from e2p_jax.data.encode import Encoder
from e2p_jax.data.stops import named_stops
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError

Make = Callable[..., PreTrainedTokenizerFast]

# No header for a reply to a reply.
ONLY_AFTER_USER = CHATML.replace(
    "{%- if add_generation_prompt %}", "{%- if messages[-1]['role'] == 'user' and add_generation_prompt %}"
)
NO_PROMPT = CHATML.replace("{%- if add_generation_prompt %}", "{%- if false %}")
# Nothing ends a turn but the next one's header.
NO_END = """{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'Bot: ' }}{% generation %}{{ m['content'] }}\
{% endgeneration %}{% else %}{{ 'Me: ' + m['content'] }}{% endif %}{{ '\\n' }}{% endfor %}\
{{ 'Bot: ' if add_generation_prompt }}"""
# Markers that take the header in, and that leave the end out of the last turn.
HEADER_IN = NO_END.replace("{{ 'Bot: ' }}{% generation %}", "{% generation %}{{ 'Bot: ' }}")
LAST_OPEN = NO_END.replace("{{ m['content'] }}", "{{ m['content'] + ('' if loop.last else eos_token) }}")


def conversation(*messages: str) -> Record:
    """`u: hi`, `a: hello`, `s: be kind`."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    said = tuple({"role": roles[m[0]], "content": m[3:]} for m in messages)
    return Record("ann", (), said, source="talk.jsonl:7")


def targets(encoder: Encoder, record: Record) -> list[str]:
    """The text of each run of targets."""
    example = encoder.encode(record, "none")
    runs: list[list[int]] = []
    for place, (token, is_target) in enumerate(zip(example.tokens.tolist(), example.is_target.tolist(), strict=True)):
        if is_target:
            runs = [*runs, []] if not place or not example.is_target[place - 1] else runs
            runs[-1].append(token)
    return [str(encoder.tokenizer.decode(run)) for run in runs]


def test_targets_of_every_shape_are_the_reply_and_its_end_or_refused(make_tokenizer: Make) -> None:
    shapes = [
        ("u: hi", "a: one"),
        ("u: hi", "a: one", "u: so", "a: two"),
        ("s: be kind", "u: hi", "a: one"),
        ("u: hi", "a: one", "u: bye"),
        ("u: hi", "a: one", "a: two"),
        ("a: one",),
        ("a: one", "u: hi", "a: two"),
        ("u: hi", "u: there", "a: one"),
    ]
    for template, end in ((CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>"), (None, "</s>")):
        encoder = make_encoder(make_tokenizer(chat_template=template))
        for shape in shapes:
            if shape[0][0] == "a" and template is not None:  # they look at what a conversation begins with
                with pytest.raises(
                    UserError, match=r"talk\.jsonl:7: .*refuses this conversation, which begins with a reply"
                ):
                    encoder.encode(conversation(*shape), "none")
                continue
            said = [m[3:] + end for m in shape if m[0] == "a"]
            assert [text.strip() for text in targets(encoder, conversation(*shape))] == said
    encoder = make_encoder(make_tokenizer(chat_template=ONLY_AFTER_USER))
    for shape in (shape for shape in shapes if shape[0][0] != "a"):
        if any(pair in "".join(m[0] for m in shape) for pair in ("aa", "sa")):
            with pytest.raises(UserError, match=r"talk\.jsonl:7: .*'<\|im_start\|>assistant\\n', which would be learn"):
                encoder.encode(conversation(*shape), "none")
        else:
            assert targets(encoder, conversation(*shape)) == [m[3:] + "<|im_end|>" for m in shape if m[0] == "a"]
    encoder.encode_prompt(conversation("u: hi", "a: one", "a: two", "u: so"), "none")  # no targets, nothing wrong
    brackets = make_encoder(make_tokenizer(chat_template=BRACKETS))  # no header that could be missing
    assert targets(brackets, conversation("u: hi", "a: one", "a: two")) == [" one</s> two</s>"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (NO_PROMPT, "it has no generation prompt, so that '<|im_start|>assistant".replace("|", r"\|")),
        (HEADER_IN, "do not begin where its generation prompt ends"),
        (LAST_OPEN, "a reply ends with '</s>' in one place and with '' in another"),
    ],
    ids=["no prompt", "header in", "last open"],
)
def test_templates_whose_targets_are_wrong_are_refused_at_the_start(
    make_tokenizer: Make, template: str, words: str
) -> None:
    with pytest.raises(UserError, match=rf"made-here: .*{words}.*set data\.chat_template") as caught:
        make_encoder(make_tokenizer(chat_template=template))
    assert "\n" not in str(caught.value)


def test_stop_tokens_are_all_that_end_a_reply(make_tokenizer: Make, tmp_path: Path) -> None:
    """The tokenizer's EOS, those of both configs, and what ends a trained turn."""
    tokenizer = make_tokenizer(chat_template=CHATML)
    eos, end = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    assert make_encoder(tokenizer).stops == (eos, end) and not make_encoder(tokenizer).warnings
    assert named_stops(tmp_path) == set()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 11, "text_config": {"eos_token_id": [106, 1]}}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 9]}))
    assert named_stops(tmp_path) == {1, 9, 11, 106}
    encoder = Encoder.from_config(Config(), tokenizer, stops=named_stops(tmp_path))
    assert encoder.stops == tuple(sorted({1, 9, 11, 106, eos, end}))
    for wrong in ('{"eos_token_id": "2"}', '{"eos_token_id": [true]}', "[]", "{"):
        (tmp_path / "generation_config.json").write_text(wrong)
        with pytest.raises(UserError, match=r"generation_config\.json: "):
            named_stops(tmp_path)


def test_a_reply_that_nothing_stops_is_warned_of(make_tokenizer: Make) -> None:
    (warning,) = make_encoder(make_tokenizer(chat_template=NO_END)).warnings
    assert "ends a reply with nothing that stops generation" in warning and "\n" not in warning
    assert not make_encoder(
        make_tokenizer(chat_template=NO_END.replace("m['content'] }}", "m['content'] + '</s>' }}"))
    ).warnings


def test_a_token_beyond_the_embedding_is_refused(make_tokenizer: Make, talk: Any) -> None:
    """At the start if the template or the tokenizer itself writes it, else where a record does."""
    tokenizer = make_tokenizer(chat_template=CHATML)
    tokenizer.add_tokens(["covid", "<image>"])
    encoder = Encoder.from_config(Config(), tokenizer, 600)
    encoder.encode(talk(*TURNS, "<image>?"), "none")  # markup is text, and gives no such token
    for record in (talk("hi", "i have covid"), talk("covid?", "no")):
        with pytest.raises(UserError, match=r"talk\.jsonl:1: the token 'covid' has id 600, but .* 600 rows; take it"):
            encoder.encode(record, "none")
    with pytest.raises(UserError, match=r"talk\.jsonl:1: the token 'covid'"):
        encoder.encode_prompt(talk("covid?"), "e2p")
    Encoder.from_config(Config(), tokenizer, 602).encode(talk("covid?", "no"), "none")
    tokenizer.add_tokens([AddedToken("<|role:user|>", normalized=False)])
    by_role = CHATML.replace("'<|im_start|>' + message['role']", "'<|role:' + message['role'] + '|>'")
    tokenizer.chat_template = by_role.replace("<|im_start|>assistant", "<|role:assistant|>")
    with pytest.raises(UserError, match=r"made-here: the token '<\|role:user\|>' has id 602"):
        Encoder.from_config(Config(), tokenizer, 602)


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
SWELLING = "{% set n = namespace(s='aaaa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}"
LONG = "{% for i in range(99999) %}{{ '" + "a" * 200 + "' }}{% endfor %}"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (ENDLESS, "does not end within 1 s"),
        (SWELLING, "needs more than 512 MiB of memory"),
        ("{{ 'a' * 10**10 }}", "needs more than 512 MiB of memory"),
        (LONG, "writes more than 16,777,216 characters"),
    ],
    ids=["endless", "swelling", "huge", "long"],
)
@pytest.mark.parametrize("marked", [False, True])
def test_a_template_that_does_not_end_is_refused(
    make_tokenizer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, words: str, marked: bool
) -> None:
    if fault == ENDLESS:  # to fill the memory takes time, too
        monkeypatch.setattr(bounded, "SECONDS", 1)
    path = tmp_path / "chat.jinja"
    path.write_text(fault + NO_END)
    tokenizer, chosen = (
        (make_tokenizer(), str(path)) if marked else (make_tokenizer(chat_template=fault + CHATML), "auto")
    )
    with pytest.raises(
        UserError, match=rf"(chat\.jinja|made-here): the chat template {words}.*set data\.chat_template"
    ):
        make_encoder(tokenizer, chat_template=chosen)


@pytest.mark.parametrize(
    "fault",
    [
        "{{ 1 + 'a' }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages[99]['content']['x'] }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ range(10**9) }}",
        "{% if %}",
        "{{ x | nofilter }}",
    ],
)
def test_whatever_a_template_raises_is_one_line(make_tokenizer: Make, talk: Any, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    for template, always in (
        (fault + NO_END, True),
        ("{% if messages[0]['content'] == 'boo' %}" + fault + "{% endif %}" + NO_END, False),
    ):
        path.write_text(template)
        if always or fault == "{% if %}":
            with pytest.raises(UserError, match=r"made-here: the chat template cannot be used \(") as caught:
                make_encoder(make_tokenizer(), chat_template=str(path))
        else:
            encoder = make_encoder(make_tokenizer(), chat_template=str(path))
            encoder.encode(talk(*TURNS), "none")
            with pytest.raises(
                UserError, match=r"talk\.jsonl:1: the chat template refuses this conversation"
            ) as caught:
                encoder.encode(talk("boo", "ok"), "none")
        assert "\n" not in str(caught.value)
