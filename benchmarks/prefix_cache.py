"""First-token time of users who share a long prompt, on a real engine: soft token in front, late, and persona as text.

    python benchmarks/prefix_cache.py --front FRONT --late LATE --engine http://127.0.0.1:8000 --users u1 u2 u3

Both tables are of the same backbone, which vLLM serves with its prefix cache on and `--enable-prompt-tokens-details`:
one of a run with `prefix.placement` after_bos or before_bos, one with before_reply. A system message of `words` words,
a token each, is common to all users; a short question follows. The first request of each way finds nothing in the cache
(its message begins with words of its own); each further one is another user's. Prints a table: milliseconds until a
reply of one token is there, and how many tokens of the prompt came from the cache.
"""

import json
import random
import statistics
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from e2p_jax.export.client import EngineClient
from e2p_jax.export.prefix_reader import PrefixTable

WORDS = """the a cat house river day long walks sees red quiet and then near old tree boat bread music
rain""".split()  # noqa: SIM905 (as one would type them)
PERSONA = "i like to cook, my dog is old, i play the drums, i live near the sea, and i work in a library."
QUESTION = "what should i read next?"

Body = Callable[[str, str], dict[str, Any]]  # of a user and the common text


def ask(engine: str, body: dict[str, Any]) -> tuple[float, int, int]:
    """Milliseconds, tokens of the prompt, and those of them that were cached."""
    data = json.dumps(body | {"max_tokens": 1, "temperature": 0}).encode()
    request = urllib.request.Request(f"{engine}/v1/completions", data, {"Content-Type": "application/json"})
    began = time.perf_counter()
    with urllib.request.urlopen(request) as answer:
        usage = json.load(answer)["usage"]
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return 1000 * (time.perf_counter() - began), usage["prompt_tokens"], cached


def ways(front: PrefixTable, late: PrefixTable, model: str) -> dict[str, Body]:
    in_front, behind = EngineClient(front, model, cache_salt=False), EngineClient(late, model, cache_salt=False)
    salted = EngineClient(late, model)

    def said(system: str, question: str = QUESTION) -> list[dict[str, str]]:
        return [{"role": "system", "content": system}, {"role": "user", "content": question}]

    return {
        "soft token in front": lambda user, text: in_front.vllm_completion(user, said(text)),
        "soft token late": lambda user, text: behind.vllm_completion(user, said(text)),
        "soft token late, salted": lambda user, text: salted.vllm_completion(user, said(text)),
        "persona as text in front": lambda user, text: behind.vllm_completion(None, said(f"{user}: {PERSONA} {text}")),
        "persona as text late": lambda user, text: behind.vllm_completion(None, said(text, f"{user}: {PERSONA}")),
        "nothing": lambda user, text: behind.vllm_completion(None, said(text)),
    }


def main(
    front: Path, late: Path, engine: str, users: tuple[str, ...], model: str = "my-model", words: int = 2000
) -> None:
    """Times each way.

    Args:
      front: Table of a run whose soft tokens stand in front.
      late: Table of a run with prefix.placement=before_reply.
      engine: URL of vLLM.
      users: Of both tables, who ask one after the other.
      model: Name that vLLM serves.
      words: Of the common message, a token each.
    """
    tables = PrefixTable(front), PrefixTable(late)
    print(
        "| way | prompt | first user, ms | further users, ms (median) | of their prompt cached |\n|---|---|---|---|---|"
    )
    for name, body in ways(*tables, model).items():
        text = f"{name} {random.random()}. " + " ".join(random.choices(WORDS, k=words))
        (cold, prompt, _), *warm = (ask(engine, body(user, text)) for user in users)
        cached = sorted({found for _, _, found in warm})
        taken = statistics.median(taken for taken, _, _ in warm)
        print(f"| {name} | {prompt} | {cold:,.0f} | {taken:,.0f} | {', '.join(map(str, cached))} |", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
