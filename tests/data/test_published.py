"""Chat templates of published models, as the trl package carries them, and the table of them in docs/backbones.md."""

import functools
import importlib.metadata
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from test_encode import make_encoder
from test_tools import TOOLS, call, record, reply, user
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from e2p_jax.config import Thinking
from e2p_jax.data.encode import Encoder
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError

Make = Callable[..., PreTrainedTokenizerFast]

DOCS = Path(__file__).parents[2] / "docs" / "backbones.md"
MODELS = {
    "llama3": "Llama 3",
    "llama3_1": "Llama 3.1",
    "qwen2_5": "Qwen2.5",
    "qwen3": "Qwen3",
    "qwen3_instruct_2507": "Qwen3 Instruct 2507",
    "qwen3_5_think": "Qwen3.5",
    "qwen3_6": "Qwen3.6",
    "deepseek_r1_distill": "DeepSeek-R1-Distill",
    "phi3": "Phi-3",
    "phi3_5": "Phi-3.5",
    "gemma": "Gemma 1, 2",
    "gemma3": "Gemma 3",
    "gemma4_v2": "Gemma 4, as released",
    "cohere2": "Command R7B kin (Cohere 2)",
    "glm4moe": "GLM-4.5",
    "gptoss": "gpt-oss",
    "deepseekv3": "DeepSeek-V3",
}
MARKUP = re.compile(r"<\|?[\w▁]+\|?>|<｜[^｜\n]+｜>|</\w+>|\[gMASK\]")
TALK = [user("hi"), reply("hello"), user("any pets?"), reply("a dog.")]
SYSTEM = {"role": "system", "content": "be kind"}
COLUMNS = (
    "models",
    "what stands in front of a reply",
    "`none`, `empty`, `full` differ",
    "a system message is",
    "tools are listed, called, answer",
    "one exchange is the publisher's with",
    "a dialogue is trl's training template's with",
)


@functools.cache
def template(name: str) -> str | None:
    try:
        files = importlib.metadata.files("trl") or ()
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("trl is absent: pip install --no-deps trl")
    held = [file for file in files if str(file) == f"trl/chat_templates/{name}.jinja"]
    return held[0].read_text(encoding="utf-8") if held else None


def tokenizer_of(make: Make, name: str) -> PreTrainedTokenizerFast:
    source = template(name)
    assert source is not None
    dated = re.sub(r"strftime_now\([\"'](.*?)[\"']\)", "'26 Jul 2024'", source)
    tokenizer = make(chat_template=dated)
    markup = sorted(set(MARKUP.findall(source)))
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=text[1] in "|｜") for text in markup])
    return tokenizer


def encoders(make: Make, name: str) -> dict[Thinking, Encoder]:
    found: dict[Thinking, Encoder] = {}
    for mode in get_args(Thinking):
        try:
            found[mode] = make_encoder(tokenizer_of(make, name), thinking=mode)
        except UserError as error:
            assert mode == "full" and "shows no thoughts" in str(error)
    return found


def shown(encoder: Encoder, *messages: dict[str, Any], prompt: bool = False) -> str:
    return encoder.structure.render(messages, prompt=prompt).text


def takes(encoder: Encoder, said: Record) -> bool:
    try:
        encoder.encode(said, "none")
    except UserError:
        return False
    return True


def equal(found: dict[Thinking, Encoder], source: str | None, *messages: dict[str, Any]) -> str:
    """The first mode whose text is that of another template."""
    if source is None:
        return "(it has none)"
    dated = re.sub(r"strftime_now\([\"'](.*?)[\"']\)", "'26 Jul 2024'", source)
    theirs = found["auto"].tokenizer.apply_chat_template(list(messages), chat_template=dated, tokenize=False)
    return next((f"`{mode}`" for mode, encoder in found.items() if shown(encoder, *messages) == theirs), "no")


def row(make: Make, name: str) -> list[str]:
    found = encoders(make, name)
    auto = found["auto"]
    note = next((note for note in auto.notes if "every reply" in note), "'as published'")
    front = re.search(r"'(.*)'", note.replace("\n", r"\n"))
    alike = {shown(encoder, *TALK) + shown(encoder, TALK[0], prompt=True) for encoder in found.values()}
    asked = (user("rain?"), reply(None, tool_calls=[call() | {"id": "abcdefghi"}]))
    said = {"role": "tool", "content": "wet", "name": "look", "tool_call_id": "abcdefghi"}
    tools = (record(*TALK, tools=TOOLS), record(*asked, tools=TOOLS), record(*asked, said, reply("yes"), tools=TOOLS))
    dialogue = TALK if auto.structure.folds else [SYSTEM, *TALK]
    return [
        MODELS[name],
        "what does earlier" if front is None else front[1] if front[1] == "as published" else f"`{front[1]}`",
        "yes" if len(alike) > 1 else "no",
        "in the first user turn" if auto.structure.folds else "a turn",
        ", ".join("yes" if takes(auto, each) else "no" for each in tools),
        equal(found, template(name), *TALK[:2]),
        equal(found, template(f"{name}_training"), *dialogue),
    ]


def test_the_table_of_templates_is_what_is_done(make_tokenizer: Make) -> None:
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(row(make_tokenizer, name) for name in MODELS)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    assert table in DOCS.read_text(encoding="utf-8"), f"docs/backbones.md should say\n{table}"


@pytest.mark.parametrize(
    ("name", "call_end", "end"), [("glm4moe", "<|observation|>", "<|user|>"), ("gptoss", "<|call|>", "<|end|>")]
)
def test_a_call_ends_with_a_token_of_its_own_that_stops_generation(
    make_tokenizer: Make, name: str, call_end: str, end: str
) -> None:
    """GLM's is written when the tool answers, gpt-oss' ends calls alone, in which another turn names the tool again."""
    encoder = make_encoder(tokenizer_of(make_tokenizer, name))
    asked = (user("rain?"), reply(None, tool_calls=[call()]))
    turns = (*asked, {"role": "tool", "content": "wet"}, reply("yes."))
    tokenizer = encoder.tokenizer

    def targets(*messages: dict[str, Any]) -> str:
        example = encoder.encode(record(*messages, tools=TOOLS), "none")
        return str(tokenizer.decode(example.tokens[example.is_target]))

    assert targets(*asked).endswith(call_end) and "look" in targets(*asked)
    assert targets(*turns).startswith(targets(*asked)) and targets(*turns).endswith(f"yes.{end}")
    only_where_needed = "if message['tool_calls'] and" in encoder.template  # runs of other templates open as they are
    assert only_where_needed == (name == "glm4moe")
    assert {tokenizer.convert_tokens_to_ids(token) for token in (call_end, end)} <= {*encoder.stops}
    if name == "gptoss":
        prompt = encoder.encode_prompt(record(*turns[:3], tools=TOOLS), "none")
        written = [encoder.structure.calling.write(asked[1]) if m is asked[1] else m for m in turns[:3]]
        own = tokenizer.apply_chat_template(written, tools=TOOLS, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(prompt.tokens) == own
        with pytest.raises(UserError, match="rewrites earlier turns"):
            targets(user("rain?"), reply("let me look.", tool_calls=[call()]), *turns[2:])
