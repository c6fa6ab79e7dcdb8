"""e2p_jax and an exported model put the soft tokens in the same places, whatever the conversation says."""

import dataclasses
import importlib
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_encode import make_encoder
from test_structure import conversation
from test_template import BRACKETS, CHATML, LLAMA3
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from e2p_jax.backbone.weights import EMBEDDED
from e2p_jax.data.encode import Encoder, load_tokenizer
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError
from e2p_jax.export.slot import reply_opening, user_turn

Make = Callable[..., PreTrainedTokenizerFast]

# A header that the text of a message may run into: a space, which joins the first word, and an empty line.
SPACED = CHATML.replace("+ '\\n' + message['content']", "+ ': ' + message['content']").replace(
    "<|im_start|>assistant\\n", "<|im_start|>assistant: "
)
ALTERNATE = """{% for message in messages %}{% if (message['role'] == 'assistant') != (loop.index0 % 2 == 1) %}\
{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"""
PIECES = [
    *("hi", "why?", "a dog.", "7", "\u00e9t\u00e9", "\U0001f600", "(so)", "'s", " ", "  ", "\n", "\n\n", "\t", "\r\n"),
    *["\ue000"] * 4,  # what the place was once searched by
    *("zqxajv", "zqxbjv", "<|", "|>", "<|user|>", "<|im_start|>user\n", "<|im_start|>", "<|im_end|>\n", "</s>"),
    *("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>", "<|end|>", "<s>", "User: ", "\nUser: hi", "user\n"),
]


def in_model(ids: list[int], placement: str = "in_chat", **found: Any) -> list[int]:
    """Where the exported modelling code puts them."""
    code = importlib.import_module("e2p_jax.export.remote_code.modeling_e2p")
    config = SimpleNamespace(placement=placement, **found)
    return code.E2PForCausalLM.slot_starts(SimpleNamespace(config=config), ids, 0)


def encoders(make: Make) -> dict[str, Encoder]:
    made = {"embedded": load_tokenizer(EMBEDDED, 4096), "chatml": make(chat_template=CHATML)}
    made |= {"llama3": make(chat_template=LLAMA3), "spaced": make(chat_template=SPACED), "plain": make()}
    return {name: make_encoder(tokenizer, "in_chat") for name, tokenizer in made.items()}


def hostile(rng: random.Random, *, system: bool) -> tuple[str, ...]:
    def said() -> str:
        return "".join(rng.choices(PIECES, k=rng.randint(1, 6))) + "."

    turns = [f"{'ua'[n % 2]}: {said()}" for n in range(2 * rng.randint(0, 2) + 1)]
    return (f"s: {said()}", *turns) if system else tuple(turns)


@pytest.mark.parametrize("style", ["embedded", "chatml", "llama3", "spaced", "plain"])
def test_exported_models_find_the_slot_that_training_had(make_tokenizer: Make, style: str) -> None:
    encoder, rng = encoders(make_tokenizer)[style], random.Random(0)
    turn = user_turn(encoder)
    assert turn["opening"] == (style == "plain")
    controls = [n for n in encoder.controls.values() if n != encoder.tokenizer.unk_token_id]
    for number in range(60):
        system = bool(number % 2)
        shape = hostile(rng, system=system)
        record = conversation(*shape)
        example = encoder.encode_prompt(record, "e2p")
        (start,) = example.slot_starts
        ids = np.delete(example.tokens, start).tolist()
        stock = encoder.tokenizer.apply_chat_template(
            list(record.messages), chat_template=encoder.template, add_generation_prompt=True, return_dict=True
        )
        assert ids == stock["input_ids"]
        # By structure: as many control tokens before it as in front of the first question of any such conversation.
        plain = encoder.encode_prompt(conversation(*(f"{m[0]}: hi" for m in shape)), "e2p")
        before, usual = (np.isin(e.tokens[: e.slot_starts[0]], controls).sum() for e in (example, plain))
        assert before == usual
        if style == "plain" and system:
            with pytest.raises(ValueError, match="does not begin with a user turn"):
                in_model(ids, user_turn=turn)
        else:
            assert in_model(ids, user_turn=turn) == [start]


@pytest.mark.parametrize("style", ["embedded", "chatml", "llama3", "spaced", "brackets"])
def test_exported_models_find_every_reply(make_tokenizer: Make, style: str) -> None:
    """Also one without a header, where a control token ends the question."""
    made = {name: encoder.tokenizer for name, encoder in encoders(make_tokenizer).items()}
    made["brackets"] = make_tokenizer(chat_template=ALTERNATE + BRACKETS)
    made["brackets"].add_tokens([AddedToken(text, normalized=False, special=True) for text in ("[INST]", "[/INST]")])
    encoder, rng = make_encoder(made[style], "before_reply", 2), random.Random(1)
    opening = reply_opening(encoder)
    for number in range(60):
        record = conversation(*hostile(rng, system=bool(number % 2) and style != "brackets"))
        answered = dataclasses.replace(record, messages=(*record.messages, {"role": "assistant", "content": "yes."}))
        for example in (encoder.encode_prompt(record, "e2p"), encoder.encode(answered, "e2p")):
            places = example.slot_places(2)
            ids = np.delete(example.tokens, places).tolist()
            found = in_model(ids, "before_reply", reply_opening=opening)
            assert found == [start - 2 * n for n, start in enumerate(example.slot_starts)]
            assert len(found) == sum(message["role"] == "assistant" for message in answered.messages)
    with pytest.raises(ValueError, match="no reply opens in the prompt"):
        in_model(ids[:2], "before_reply", reply_opening=opening)


def test_replies_that_open_with_plain_text_are_not_exported(make_tokenizer: Make) -> None:
    for template in (None, BRACKETS):
        encoder = make_encoder(make_tokenizer(chat_template=template), "before_reply")
        with pytest.raises(UserError, match=r"opens replies with plain text, .*; an exported model cannot tell where"):
            reply_opening(encoder)


def test_a_header_that_a_system_message_can_forge_is_not_exported(make_tokenizer: Make, talk: Any) -> None:
    """The system message stands bare, and a turn begins with plain text."""
    bare = """{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'Bot:' }}{% generation %}\
{{ ' ' + m['content'] + eos_token }}{% endgeneration %}{% else %}\
{{ ('User: ' if m['role'] == 'user' else '') + m['content'] + '\\n' }}{% endif %}{% endfor %}\
{{ 'Bot:' if add_generation_prompt }}"""
    encoder = make_encoder(make_tokenizer(chat_template=bare), "in_chat")
    encoder.encode(talk("hi", "ok", system="User: me\nBot: ok"), "e2p")  # training sees the messages themselves
    with pytest.raises(UserError, match="opens user turns in more than one way; use after_bos"):
        user_turn(encoder)


def test_a_place_that_depends_on_the_question_is_refused(make_tokenizer: Make) -> None:
    echo = CHATML.replace(
        "{% for message in messages %}", "{{ messages[-1]['content'][:1] }}{% for message in messages %}"
    )
    marked = echo.replace("message['content'] +", "'' }}{% generation %}{{ message['content'] +").replace(
        "+ '\\n' }}\n{%- endfor", "}}{% endgeneration %}{{ '\\n' }}\n{%- endfor"
    )
    encoder = make_encoder(make_tokenizer(chat_template=marked.replace("messages[-1]", "messages[0]")), "in_chat")
    record = Record("ann", (), ({"role": "user", "content": "hi"},), source="talk.jsonl:1")
    with pytest.raises(UserError, match=r"talk\.jsonl:1: .*depends on its text"):
        encoder.encode_prompt(record, "e2p")
