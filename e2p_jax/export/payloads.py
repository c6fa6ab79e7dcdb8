"""Writes what vLLM and SGLang read: prompts as embeddings, soft tokens included. Imports NumPy only.

vLLM (docs.vllm.ai, "Prompt Embedding Inputs"; PRs #17590, #40720): base64 of `torch.save` of a [tokens, D] tensor, in
the field `prompt_embeds` of a completion, or as a content part of a chat message. SGLang: nested floats in the field
`input_embeds` of `/generate`.
"""

import base64
import functools
import hashlib
import io
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from e2p_jax.errors import UserError

SAMPLING = {"max_tokens": 64, "temperature": 0.0}  # as `e2p generate`; edit the payload for others
NO_SALT: Mapping[str, str] = {}


def vllm_completion(
    model: str, embeddings: np.ndarray, stops: Sequence[int], salt: Mapping[str, str] = NO_SALT
) -> dict[str, Any]:
    """Body for `/v1/completions`.

    Args:
      model: the name that the server serves.
      embeddings: [T, D] float32, float16 or bfloat16: the whole templated prompt.
      stops: token ids that end a reply, beside those that the server knows.
      salt: see `cache_salt`.
    """
    ends = {"stop_token_ids": list(stops)}
    return {"model": model, "prompt_embeds": tensor_base64(embeddings), **SAMPLING, **ends, **salt}


def vllm_text(model: str, tokens: np.ndarray, stops: Sequence[int]) -> dict[str, Any]:
    """Body for `/v1/completions` of a prompt without soft tokens.

    Args:
      model: the name that the server serves.
      tokens: [T] int32.
      stops: token ids that end a reply, beside those that the server knows.
    """
    return {"model": model, "prompt": tokens.tolist(), **SAMPLING, "stop_token_ids": list(stops)}


def vllm_chat(
    model: str,
    messages: Sequence[dict[str, str]],
    prefix: np.ndarray,
    stops: Sequence[int],
    salt: Mapping[str, str] = NO_SALT,
) -> dict[str, Any]:
    """Body for `/v1/chat/completions`: the soft tokens stand inside the first user turn.

    Args:
      model: the name that the server serves.
      messages: `{role, content}`, one of them a user's.
      prefix: [K, D].
      stops: token ids that end a reply, beside those that the server knows.
      salt: see `cache_salt`.

    Raises:
      UserError: no user turn, or one that begins with white space, which training joined to the template's own.
    """
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise UserError("the conversation has no user turn for the soft tokens to stand in; add one")
    if messages[first]["content"][:1].isspace():
        raise UserError(
            "the first user turn begins with white space, which the chat endpoint would tokenise otherwise than "
            "training did; strip it, or use the completion form, which sends the whole prompt"
        )
    parts = [
        {"type": "prompt_embeds", "data": tensor_base64(prefix)},
        {"type": "text", "text": messages[first]["content"]},
    ]
    spoken = [*messages[:first], {"role": "user", "content": parts}, *messages[first + 1 :]]
    ends = {"stop_token_ids": list(stops)}
    return {"model": model, "messages": spoken, **SAMPLING, **ends, **salt}


def sglang(embeddings: np.ndarray, stops: Sequence[int]) -> dict[str, Any]:
    """Body for `/generate`.

    Args:
      embeddings: [T, D]: the whole templated prompt.
      stops: token ids that end a reply, beside those that the server knows.
    """
    _refuse_extreme(embeddings)
    sampling: dict[str, Any] = {"max_new_tokens": SAMPLING["max_tokens"], "temperature": SAMPLING["temperature"]}
    sampling["stop_token_ids"] = list(stops)
    return {"input_embeds": embeddings.astype(np.float32).tolist(), "sampling_params": sampling}


def refuse_sglang(model_type: str, where: str) -> None:
    """For the families for which SGLang (0.5.23) scales embeddings from outside, soft tokens included.

    Raises:
      UserError: naming `where` the model comes from.
    """
    if model_type in ("gemma", "gemma2"):
        raise UserError(
            f"{where}: SGLang multiplies what a request sends to a {model_type} by the square root of D, the soft "
            "tokens too; serve it with vLLM (0.32), or with --format transformers"
        )


def soft_tokens(prefix: np.ndarray, dtype: np.dtype, user: str) -> np.ndarray:
    """[K, D] in the dtype of the token embeddings that they will stand among.

    Raises:
      UserError: naming the user whose soft tokens are not finite in that dtype, or in float16, in which an engine may
        run.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        out = prefix.astype(dtype)
    if not _fits(out).all():
        name = "float16, in which an engine may read them" if np.isfinite(out).all() else dtype.name
        raise UserError(f"user {user!r}: the soft tokens are not finite in {name}; repair or drop that vector")
    return out


def _fits(array: np.ndarray) -> np.ndarray:
    """[...] bool, of [..., D]. After a request that is not finite vLLM (0.32) answers every later one with nothing."""
    most: np.ndarray = np.abs(array.astype(np.float32)).max(axis=-1, initial=0)
    return most <= np.finfo(np.float16).max


def _refuse_extreme(array: np.ndarray) -> None:
    if not (fits := _fits(array)).all():
        place = int(np.flatnonzero(~fits)[0])
        raise UserError(f"embedding {place} of a request is not finite in float16; repair or drop the user's vector")


def with_prefix(tokens: np.ndarray, slots: np.ndarray, prefix: np.ndarray) -> np.ndarray:
    """[T, D] token embeddings with the soft tokens [K, D], of the same dtype, in their slots [G, K]."""
    out = np.array(tokens)
    out[slots] = prefix
    return out


def cache_salt(prefix: np.ndarray) -> dict[str, str]:
    """The field that lets vLLM share cached blocks among requests with the same soft tokens [K, D] only.

    So a user's later turns find the earlier ones, and another version of the vector, or another user, finds nothing.
    """
    return {"cache_salt": hashlib.sha256(f"{prefix.dtype.str} {prefix.shape}".encode() + prefix.tobytes()).hexdigest()}


def tensor_base64(array: np.ndarray) -> str:
    """Base64 of what `torch.save` writes for a contiguous CPU tensor.

    That is a ZIP archive of the raw numbers and a pickle that says how to view them. The pickle's opcodes are spelt out
    here, nothing is ever unpickled, and torch is not needed.

    Args:
      array: float32, float16 or bfloat16.

    Raises:
      UserError: a number is not finite in float16.
    """
    _refuse_extreme(array)
    numbers = array.tobytes()
    checksum = zlib.crc32(numbers).to_bytes(4, "little")
    begin, middle, behind, end = _archive(array.dtype, array.shape, len(numbers))
    return base64.b64encode(b"".join((begin, checksum, middle, numbers, behind, checksum, end))).decode()


@functools.lru_cache(4096)
def _archive(dtype: np.dtype, shape: tuple[int, ...], size: int) -> tuple[bytes, bytes, bytes, bytes]:
    """The file but for the numbers and, twice, their checksum, which a server's prompts of one length differ in.

    Args:
      size: of the numbers, bytes.
    """
    storage = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}[dtype.name]
    count, *strides = [math.prod(shape[axis:]) for axis in range(len(shape) + 1)]
    pickled = (
        b"\x80\x02"  # protocol 2
        + _global("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + (b"(" + _text("storage") + _global("torch", storage) + _text("0") + _text("cpu") + _int(count) + b"tQ")
        + _int(0)  # offset
        + (b"(" + b"".join(map(_int, shape)) + b"t")
        + (b"(" + b"".join(map(_int, strides)) + b"t")
        + b"\x89"  # requires_grad: False
        + (_global("collections", "OrderedDict") + b")R")  # hooks: none
        + b"tR."  # call and stop
    )
    files = {"data/0": bytes(size), "data.pkl": pickled, "byteorder": b"little", "version": b"3\n"}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, held in files.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), held)  # without the time: equal arrays, equal bytes
        first = archive.infolist()[0]
    # The checksum stands at byte 14 of what is in front of the numbers, and at byte 16 of the list of files.
    whole, before, listed = buffer.getvalue(), len(first.FileHeader()), archive.start_dir
    return whole[:14], whole[18:before], whole[before + size : listed + 16], whole[listed + 20 :]


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


def _int(number: int) -> bytes:
    return b"J" + number.to_bytes(4, "little", signed=True)
