"""`e2p serve`."""

import re
from pathlib import Path
from typing import Annotated, Literal

import tyro

from e2p_jax.errors import UsageError, UserError


def serve(
    table: tyro.conf.Positional[Path],
    /,
    engine: Annotated[str, tyro.conf.arg(metavar="URL")],
    host: str = "127.0.0.1",
    port: int = 8080,
    unknown: Literal["null", "none", "error"] = "error",
    chat: bool = False,
    cache_salt: bool = True,
    max_body: int = 2**20,
    max_requests: int = 256,
    timeout: float = 300.0,
    reload: float = 60.0,
) -> None:
    """Speaks the OpenAI chat API in front of vLLM, and puts the soft tokens of a request's `user` into its prompt.

    A request names the user in the field `user` or in the header X-E2P-User, which has the last word.

    Args:
      table: Directory that `e2p prefixes` wrote.
      engine: Where vLLM serves the table's backbone and takes prompt embeddings, as http://127.0.0.1:8000.
      host: Address to listen on; another than this machine's own lets others ask as any user.
      port: To listen on; 0 is any that is free.
      unknown: What a request gets that names no user, or one who is not in the table: the null user's soft tokens
        (null; where the run has one), an answer without any (none), or an error.
      chat: Send messages and soft tokens to the engine's chat endpoint, not the whole prompt as embeddings: less to
        send. For tables with a chat_template.jinja, which the engine must have been given.
      cache_salt: Keep users apart in the engine's prefix cache by a field of each request. Without it, what stands in
        front of a late soft token is kept once for all users.
      max_body: Bytes of a request, at most.
      max_requests: That are answered at the same time, at most; others get status 503.
      timeout: Seconds that the engine may say nothing, or a client read nothing.
      reload: Seconds between two looks for a new version of the table.
    """
    if not 0 <= port < 2**16:
        raise UsageError("--port must be from 0 to 65535")
    if min(max_body, max_requests) < 1 or not 0 < min(timeout, reload) <= max(timeout, reload) < 2**31:
        raise UsageError("--max-body, --max-requests, --timeout and --reload must be positive")
    if not re.fullmatch(r"https?://([\w.-]+|\[[\da-fA-F:.]+\])(:\d{1,5})?(/[\w./-]*)?", engine):
        raise UsageError(f"--engine {engine}: give a URL, as http://127.0.0.1:8000")
    try:
        from e2p_jax.serve import gateway
    except ModuleNotFoundError as error:
        raise UserError(f"e2p serve needs {error.name}: pip install 'e2p-jax[serve]'") from error
    from e2p_jax.export.prefix_reader import PrefixTable

    settings = gateway.Settings(
        engine.rstrip("/").removesuffix("/v1"), unknown, chat, cache_salt, max_body, max_requests, timeout, reload
    )
    gateway.serve(PrefixTable(table), settings, host, port)
