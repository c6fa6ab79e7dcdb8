"""Requests for vLLM and SGLang from a prefix table alone. Imports neither jax, torch nor transformers; the tokenizer
(transformers) is loaded by the first request that needs the prompt's tokens: all but `vllm_chat`.

    client = EngineClient(PrefixTable(Path("prefixes")), model="my-org/my-model")
    body = client.vllm_completion("user-1", [{"role": "user", "content": "hi"}])
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from e2p_jax.config import from_json
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError
from e2p_jax.export import payloads
from e2p_jax.export.prefix_reader import MANIFEST, REMEDY, CheckedRows, PrefixTable, directory_name

if TYPE_CHECKING:
    from e2p_jax.data.encode import Encoder
    from e2p_jax.data.examples import Example

Messages = Sequence[dict[str, str]]
User = str | np.ndarray  # an id, or the vector [E] float32 of somebody seen just now


class EngineClient:
    """Bodies to send with any HTTP client; add to them what the server's API knows (`max_tokens`, `stream`, ...)."""

    def __init__(
        self, table: PrefixTable, model: str, cache_salt: bool = True, unknown: Literal["error", "null"] = "error"
    ):
        """
        Args:
          table: of the users to serve.
          model: the name that the server serves.
          cache_salt: whether vLLM is told to share cached blocks among requests with the same soft tokens only. Without
            it, what stands in front of a late slot is shared by all users, where the server's keys hold embeddings.
          unknown: what users get who are not in the table: an error, or the null user's soft tokens.

        Raises:
          UserError: the table is of a Gemma, and of an earlier version; or it has no null user.
        """
        self.table, self.model, self._salted, self._unknown = table, model, cache_salt, unknown
        manifest = table.manifest
        if unknown == "null" and table.null is None:
            raise UserError(f"{table.directory}: its run has no null user; train with train.null_user_rate above 0")
        if "token_scale" not in manifest and manifest["embedding_scale"] != 1:
            raise UserError(f"{table.directory}: of a Gemma, by an earlier version of e2p_jax; rerun `e2p prefixes`")
        self._scale = manifest.get("token_scale", 1)
        self._stops = manifest.get("stop_token_ids", ())  # not in tables of before
        tokens = table.directory / f"{manifest['tokens']}.tokens.safetensors"
        self._tokens = CheckedRows(tokens, "embeddings")  # [V, D]
        stored = self._tokens.rows.dtype
        self._dtype = stored if stored.name == manifest["dtype"] else np.dtype(np.float32)  # sending rounds nothing

    def reload(self) -> "EngineClient":
        """For the version of the table that is there now: this one, where nothing has changed.

        Raises:
          UserError: as when table and client are made. This client serves on.
        """
        table, before = self.table.reload(), self.table.manifest
        if table is self.table:
            return self
        made = EngineClient(table, self.model, self._salted, self._unknown)
        if all(table.manifest[part] == before[part] for part in ("tokenizer", "tokens", "config")):
            made.__dict__ |= {name: held for name, held in self.__dict__.items() if name == "_encoder"}
        return made

    def vllm_completion(self, user: User | None, messages: Messages, room: int | None = None) -> dict[str, Any]:
        """For `/v1/completions`.

        Args:
          user: None is nobody: the prompt as it is without soft tokens.
          room: tokens that prompt and reply may have together; `max_tokens` is then what the prompt leaves of it.

        Raises:
          UserError: a user who is not in the table, or a prompt that leaves no room.
        """
        example = self._encode(user, messages)
        left = {} if room is None else {"max_tokens": room - len(example.tokens)}
        if room is not None and len(example.tokens) >= room:
            raise UserError(
                f"the prompt has {len(example.tokens)} tokens; {room} is the most, with the reply; shorten it"
            )
        if user is None:
            return payloads.vllm_text(self.model, example.tokens, self._stops) | left
        prefix = self._prefix(user)
        return payloads.vllm_completion(self.model, self._fill(example, prefix), self._stops, self._salt(prefix)) | left

    def vllm_chat(self, user: User, messages: Messages) -> dict[str, Any]:
        """For `/v1/chat/completions` of a server that was given the table's `chat_template.jinja`.

        Raises:
          UserError: a user who is not in the table; no user turn, or a first one that begins with white space; or a
            table whose placement has no chat form.
        """
        if not self.table.manifest["chat"]:
            raise UserError(
                f"{self.table.directory}: trained with soft tokens {self.table.manifest['placement']}, which vLLM's "
                "chat endpoint cannot say for this template; use vllm_completion"
            )
        prefix = self._prefix(user)
        return payloads.vllm_chat(self.model, messages, prefix, self._stops, self._salt(prefix))

    def sglang(self, user: User, messages: Messages) -> dict[str, Any]:
        """For `/generate`.

        Raises:
          UserError: a user who is not in the table, or a backbone that SGLang reads otherwise.
        """
        payloads.refuse_sglang(self.table.manifest.get("model_type", ""), str(self.table.directory))
        return payloads.sglang(self.embeddings(user, messages), self._stops)

    def embeddings(self, user: User, messages: Messages) -> np.ndarray:
        """[T, D]: the templated prompt with the user's soft tokens in their slots."""
        return self._fill(self._encode(user, messages), self._prefix(user))

    def _encode(self, user: User | None, messages: Messages) -> "Example":
        name = user if isinstance(user, str) else ""
        record = Record(name, (), tuple(messages), source=f"user {name!r}" if name else "the prompt")
        return self._encoder.encode_prompt(record, "none" if user is None else "e2p")

    def _fill(self, example: "Example", prefix: np.ndarray) -> np.ndarray:
        tokens = self._tokens.read(example.tokens).astype(self._dtype)
        return payloads.with_prefix(tokens * self._dtype.type(self._scale), example.slot_places(len(prefix)), prefix)

    def _prefix(self, user: User) -> np.ndarray:
        """[K, D]"""
        if not isinstance(user, str):
            return payloads.soft_tokens(self.table.project(user[None])[0], self._dtype, "")
        look = self.table.lookup if self._unknown == "error" else lambda users: self.table.get_many(users)[0]
        return payloads.soft_tokens(look([user])[0], self._dtype, user)

    def _salt(self, prefix: np.ndarray) -> Mapping[str, str]:
        return payloads.cache_salt(prefix) if self._salted else payloads.NO_SALT

    @functools.cached_property
    def _encoder(self) -> "Encoder":
        from e2p_jax.data.encode import Encoder, load_tokenizer

        directory, name = self.table.directory, self.table.manifest["tokenizer"]
        tokenizer = directory / f"{name}.tokenizer"
        if not tokenizer.is_dir() or directory_name(tokenizer) != name:
            raise UserError(f"{tokenizer}: missing or damaged; {REMEDY}")
        config = from_json(json.dumps(self.table.manifest["config"]), directory / MANIFEST)
        # The tokenizer beside the table carries the run's template.
        config = config.change(data={"chat_template": "auto"})
        rows = len(self._tokens.rows)
        return Encoder.from_config(config, load_tokenizer(tokenizer, rows), rows, self._stops)
