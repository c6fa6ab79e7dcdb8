"""Payloads for vLLM and SGLang from a run, and the template that vLLM's chat endpoint needs."""

import copy
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from e2p_jax.data.encode import Encoder
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError
from e2p_jax.evaluate.generate import asked_for
from e2p_jax.export import payloads
from e2p_jax.export.common import refuse_not_of_users, settings_of
from e2p_jax.train.run import Run

_BEGINNINGS = ("Why?", "hi", "7 days", "(so)", "\u00e9t\u00e9", "\U0001f600", "\u4f60", "'s", "<x>")  # of a user's turn
PLACEHOLDER = "<prompt_embeds>"  # what vLLM renders a content part of embeddings as; one token a part, then K

# vLLM hands a template that takes text only its content parts joined by line breaks, which training never saw. What
# stands for embeddings is the first of a list's parts; text that looks like it is text.
_FLATTEN = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- set joined = namespace(soft='', text='') -%}
    {%- if message['content'] is string -%}
        {%- set joined.text = message['content'] -%}
    {%- elif message['content'] -%}
        {%- for part in message['content'] -%}
            {%- if loop.first and part['text'] == 'PLACEHOLDER' -%}
                {%- set joined.soft = part['text'] -%}
            {%- else -%}
                {%- set joined.text = joined.text + part['text'] -%}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- set content = joined.soft + joined.text.replace('PLACEHOLDER', 'BROKEN') -%}
    {%- set flat.messages = flat.messages + [dict(message, content=content)] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""


def export_engine(
    run: Run, format: str, users: Sequence[str], prompt: str, model: str | None = None, cache_salt: bool = True
) -> list[dict[str, Any]]:
    """A request body per user.

    Args:
      format: `vllm` (`/v1/completions`), `vllm-chat` (`/v1/chat/completions`) or `sglang` (`/generate`).
      users: ids in the run's table of user vectors, `@vector.npy`, or `@@alice` for the user `@alice`.
      prompt: the user turn to answer.
      model: the name that the server serves; the backbone's own by default.
      cache_salt: whether vLLM is to keep users apart by it; see docs/serving.md.

    Raises:
      UserError: an unknown user, a trained backbone, a family that the engine reads otherwise, or a run that the chat
        endpoint cannot serve.
    """
    encoder = run.inputs.encoder
    refuse_not_of_users(run)
    if format == "sglang":
        payloads.refuse_sglang(model_type(run), str(run.directory))
    if format == "vllm-chat" and not can_chat(encoder):
        raise UserError(
            "--format vllm-chat puts the soft tokens inside the first user turn, between tokens of the template; this "
            "run's placement or template says otherwise; use --format vllm, which sends the whole prompt"
        )
    merged, name = run.model.merged, model or run.inputs.published()[0]
    names, vectors = asked_for(run, users)
    bodies = []
    for user, vector in zip(names, vectors, strict=True):
        projected = np.asarray(merged.projector(vector))  # one by one: the same bytes, whoever else was asked for
        messages = ({"role": "user", "content": prompt},)
        example = encoder.encode_prompt(Record(user, (), messages, source="--prompt"), "e2p")
        tokens = np.asarray(merged.backbone.embed(example.tokens[None])[0])
        prefix = payloads.soft_tokens(projected, tokens.dtype, user)
        salt = payloads.cache_salt(prefix) if cache_salt else payloads.NO_SALT
        if format == "vllm-chat":
            bodies.append(payloads.vllm_chat(name, messages, prefix, encoder.stops, salt))
            continue
        whole = payloads.with_prefix(tokens, example.slot_places(encoder.num_tokens), prefix)
        if format == "sglang":
            bodies.append(payloads.sglang(whole, encoder.stops))
        else:
            bodies.append(payloads.vllm_completion(name, whole, encoder.stops, salt))
    return bodies


def model_type(run: Run) -> str:
    """The family of the run's backbone, as config.json has it."""
    settings = settings_of(run.inputs.directory)
    return str(settings.get("text_config", settings).get("model_type", ""))


def serving_template(template: str) -> str:
    """The run's template for messages whose content is a list of parts, too."""
    broken = f"{PLACEHOLDER[0]} {PLACEHOLDER[1:]}"
    return _FLATTEN.replace("PLACEHOLDER", PLACEHOLDER).replace("BROKEN", broken) + template


def can_chat(encoder: Encoder) -> bool:
    """Tells whether vLLM, given a prefix part and a text part in the first user turn, reads what training read."""
    if encoder.placement != "in_chat":
        return False
    system, reply = {"role": "system", "content": "be kind."}, {"role": "assistant", "content": "so"}
    for text in _BEGINNINGS:
        question = {"role": "user", "content": text}
        for messages in [(question,), (system, question), (question, reply, question)]:
            if _served(encoder, messages) != _trained(encoder, messages):
                return False
    return True


def _trained(encoder: Encoder, messages: tuple[dict[str, str], ...]) -> list[int]:
    """Token ids of a prompt, -1 at slots."""
    example = encoder.encode_prompt(Record("probe", (), messages, source="probe"), "e2p")
    tokens = example.tokens.copy()
    tokens[example.slot_places(encoder.num_tokens)] = -1
    ids: list[int] = tokens.tolist()
    return ids


def _served(encoder: Encoder, messages: tuple[dict[str, str], ...]) -> list[int]:
    """The same as vLLM makes them: parts, template, a token for the placeholder, K in its place."""
    body = json.loads(json.dumps(payloads.vllm_chat("", messages, np.zeros((1, 1), np.float32), ())))
    for message in body["messages"]:
        if isinstance(message["content"], list):
            message["content"][0] = {"type": "text", "text": PLACEHOLDER}
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [PLACEHOLDER]})
    template = serving_template(encoder.template)
    encoded: Any = tokenizer.apply_chat_template(
        body["messages"], chat_template=template, add_generation_prompt=True, return_dict=True
    )
    placeholder = tokenizer.convert_tokens_to_ids(PLACEHOLDER)
    pairs = ([-1] * encoder.num_tokens if token == placeholder else [token] for token in encoded["input_ids"])
    return [token for pair in pairs for token in pair]
