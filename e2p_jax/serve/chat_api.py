"""The OpenAI chat API by way of an engine's completions endpoint: requests and replies of one as those of the other.

Of what a request may hold, only what writes the prompt is of concern here: the prompt is made by this side. Everything
else goes to the engine as it came, which knows it or refuses it.
"""

from typing import Any

from e2p_jax.errors import UserError

# What would write the prompt, or needs a parser of the engine's chat endpoint.
_NOT_HERE = """add_generation_prompt chat_template chat_template_kwargs continue_final_message documents echo
function_call functions prompt prompt_embeds prompt_logprobs suffix tool_choice tools truncate_prompt_tokens""".split()  # noqa: SIM905 (as one would type them)
_NOTHING: tuple[Any, ...] = (None, False, "", "none", [], {})  # what such a field may say all the same
_OURS = ("messages", "user", "model", "stop_token_ids", "top_logprobs", "max_completion_tokens")
_LOGPROBS = ("tokens", "token_logprobs", "top_logprobs")  # lists of a completion, an entry a token


def completion_fields(request: dict[str, Any]) -> dict[str, Any]:
    """The fields of a chat request that go to the completions endpoint beside model and prompt.

    Raises:
      UserError: naming a field that would change the prompt, or that needs a parser of the chat endpoint.
    """
    refuse_prompt_fields(request, _NOT_HERE)
    fields = {name: value for name, value in request.items() if name not in (*_OURS, *_NOT_HERE)}
    if (longest := request.get("max_completion_tokens")) is not None:
        fields["max_tokens"] = longest
    asked, most = fields.pop("logprobs", None), request.get("top_logprobs")
    if asked:
        fields["logprobs"] = most or 0
    elif most:
        raise UserError("top_logprobs needs logprobs: true")
    return fields


def refuse_prompt_fields(request: dict[str, Any], names: list[str]) -> None:
    """
    Raises:
      UserError: one of these fields says something.
    """
    for name in names:
        value = request.get(name)
        if value not in _NOTHING and (name, value) != ("add_generation_prompt", True):
            raise UserError(f"{name}: the prompt is made of messages alone here; leave that field out")


def chat_reply(answer: dict[str, Any]) -> dict[str, Any]:
    """A completion as a chat completion."""
    choices = [_choice(choice, "message", {"role": "assistant"}) for choice in answer["choices"]]
    return answer | {"id": _name(answer), "object": "chat.completion", "choices": choices}


def chat_chunk(chunk: dict[str, Any], begun: set[int]) -> dict[str, Any]:
    """A chunk of a streamed completion as one of a chat completion.

    Args:
      begun: indices of the choices that have been seen; this chunk's are added.
    """
    choices = []
    for choice in chunk["choices"]:
        who = {} if choice["index"] in begun else {"role": "assistant"}
        begun.add(choice["index"])
        choices.append(_choice(choice, "delta", who))
    return chunk | {"id": _name(chunk), "object": "chat.completion.chunk", "choices": choices}


def _name(answer: dict[str, Any]) -> str:
    return f"chat{answer.get('id', '')}"


def _choice(choice: dict[str, Any], key: str, who: dict[str, str]) -> dict[str, Any]:
    kept = {name: value for name, value in choice.items() if name not in ("text", "logprobs")}
    return kept | {key: who | {"content": choice["text"]}, "logprobs": _logprobs(choice.get("logprobs"))}


def _logprobs(said: dict[str, Any] | None) -> dict[str, Any] | None:
    if said is None:
        return None
    columns = [said.get(name) or [None] * len(said["tokens"]) for name in _LOGPROBS]
    content = []
    for token, logprob, most in zip(*columns, strict=True):
        others = [_logprob(other, value) for other, value in (most or {}).items()]
        content.append(_logprob(token, logprob) | {"top_logprobs": others})
    return {"content": content}


def _logprob(token: str, logprob: float | None) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode(errors="replace"))}
