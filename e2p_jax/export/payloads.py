"""Writes what vLLM and SGLang read: prompts as embeddings, soft tokens included. Imports NumPy only.

vLLM (docs.vllm.ai, "Prompt Embedding Inputs"; PRs #17590, #40720): base64 of `torch.save` of a [tokens, D] tensor, in
the field `prompt_embeds` of a completion, or as a content part of a chat message. SGLang: nested floats in the field
`input_embeds` of `/generate`.
"""

import base64
import hashlib
import io
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from e2p_jax.errors import UserError

SAMPLING = {"max_tokens": 64, "temperature": 0.0}  # as `e2p generate`; edit the payload for others


def vllm_completion(model: str, embeddings: np.ndarray, stops: Sequence[int]) -> dict[str, Any]:
    """Body for `/v1/completions`.

    Args:
      model: the name that the server serves.
      embeddings: [T, D] float32, float16 or bfloat16: the whole templated prompt.
      stops: token ids that end a reply, beside those that the server knows.
    """
    data = tensor_base64(embeddings)
    ends = {"stop_token_ids": list(stops)}
    return {"model": model, "prompt_embeds": data, **SAMPLING, **ends, "cache_salt": _salt(data)}


def vllm_chat(
    model: str, messages: Sequence[dict[str, str]], prefix: np.ndarray, stops: Sequence[int]
) -> dict[str, Any]:
    """Body for `/v1/chat/completions`: the soft tokens stand inside the first user turn.

    Args:
      model: the name that the server serves.
      messages: `{role, content}`, one of them a user's.
      prefix: [K, D].
      stops: token ids that end a reply, beside those that the server knows.

    Raises:
      UserError: no user turn, or one that begins with white space, which training joined to the template's own.
    """
    data = tensor_base64(prefix)
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise UserError("the conversation has no user turn for the soft tokens to stand in; add one")
    if messages[first]["content"][:1].isspace():
        raise UserError(
            "the first user turn begins with white space, which the chat endpoint would tokenise otherwise than "
            "training did; strip it, or use the completion form, which sends the whole prompt"
        )
    parts = [{"type": "prompt_embeds", "data": data}, {"type": "text", "text": messages[first]["content"]}]
    spoken = [*messages[:first], {"role": "user", "content": parts}, *messages[first + 1 :]]
    ends = {"stop_token_ids": list(stops)}
    return {"model": model, "messages": spoken, **SAMPLING, **ends, "cache_salt": _salt(data)}


def sglang(embeddings: np.ndarray, stops: Sequence[int]) -> dict[str, Any]:
    """Body for `/generate`.

    Args:
      embeddings: [T, D]: the whole templated prompt.
      stops: token ids that end a reply, beside those that the server knows.
    """
    _refuse_not_finite(embeddings)
    sampling: dict[str, Any] = {"max_new_tokens": SAMPLING["max_tokens"], "temperature": SAMPLING["temperature"]}
    sampling["stop_token_ids"] = list(stops)
    return {"input_embeds": embeddings.astype(np.float32).tolist(), "sampling_params": sampling}


def refuse_scaled(scale: float, where: str) -> None:
    """For families that scale token embeddings: engines scale embeddings from outside too, soft tokens included.

    Raises:
      UserError: naming `where` the model comes from.
    """
    if scale != 1:
        raise UserError(
            f"{where}: a Gemma backbone; vLLM and SGLang multiply the embeddings that they are sent by {scale:.4g} for "
            "some Gemmas and not for others; serve it with --format transformers"
        )


def soft_tokens(prefix: np.ndarray, dtype: np.dtype, user: str) -> np.ndarray:
    """[K, D] in the dtype of the token embeddings that they will stand among.

    Raises:
      UserError: naming the user whose soft tokens are not finite in that dtype.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        out = prefix.astype(dtype)
    if not np.isfinite(out).all():
        raise UserError(f"user {user!r}: the soft tokens are not finite in {dtype.name}; repair or drop that vector")
    return out


def _refuse_not_finite(array: np.ndarray) -> None:
    if not np.isfinite(array).all():
        place = int(np.flatnonzero(~np.isfinite(array).all(axis=-1))[0])
        raise UserError(f"embedding {place} of a request is not finite; repair or drop the user's vector")


def with_prefix(tokens: np.ndarray, start: int, prefix: np.ndarray) -> np.ndarray:
    """[T, D] token embeddings with the soft tokens [K, D], of the same dtype, in their slots."""
    out = np.array(tokens)
    out[start : start + len(prefix)] = prefix
    return out


def _salt(data: str) -> str:
    """Shared by the same soft tokens only: the guard against vLLM #56655, whose prefix cache leaves out of its keys
    which positions are embeddings, and against versions that leave out the embeddings themselves.
    """
    return hashlib.sha256(data.encode()).hexdigest()


def tensor_base64(array: np.ndarray) -> str:
    """Base64 of what `torch.save` writes for a contiguous CPU tensor.

    That is a ZIP archive of the raw numbers and a pickle that says how to view them. The pickle's opcodes are spelt out
    here, nothing is ever unpickled, and torch is not needed.

    Args:
      array: float32, float16 or bfloat16.

    Raises:
      UserError: a number is not finite.
    """
    _refuse_not_finite(array)
    storage = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}[array.dtype.name]
    strides = [int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim)]
    pickled = (
        b"\x80\x02"  # protocol 2
        + _global("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + (b"(" + _text("storage") + _global("torch", storage) + _text("0") + _text("cpu") + _int(array.size) + b"tQ")
        + _int(0)  # offset
        + (b"(" + b"".join(map(_int, array.shape)) + b"t")
        + (b"(" + b"".join(map(_int, strides)) + b"t")
        + b"\x89"  # requires_grad: False
        + (_global("collections", "OrderedDict") + b")R")  # hooks: none
        + b"tR."  # call and stop
    )
    files = {"data.pkl": pickled, "byteorder": b"little", "data/0": array.tobytes(), "version": b"3\n"}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, held in files.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), held)  # without the time: equal arrays, equal bytes
    return base64.b64encode(buffer.getvalue()).decode()


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


def _int(number: int) -> bytes:
    return b"J" + number.to_bytes(4, "little", signed=True)
