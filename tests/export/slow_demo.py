"""The demo in front of a model that takes its time. Arguments: port, people (JSON), a file of the tokens made."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from e2p_jax.config import BackboneConfig, Config
from e2p_jax.export import demo, demo_access

port, people, made = int(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])


def slow(_: Any, people: Any, users: list[str], prompt: str, sampling: Any) -> Iterator[list[tuple[str, str, str]]]:
    """A user's replies hold their id. Half a minute for the longest, or minutes."""
    for token in range(sampling.max_new_tokens):
        with made.open("a") as file:
            file.write(f"{prompt}\n")
        yield [(f"{user} {token}", "y" * 5000, user) for user in users]
        time.sleep(1 if prompt == "endless" else 0.05)


demo.answers = slow
demo.SECONDS, demo_access.BODY_SECONDS = 8, 1
config = Config(backbone=BackboneConfig(path=max(people, key=len)))
page = demo.build(SimpleNamespace(inputs=SimpleNamespace(config=config), step=3), people)  # type: ignore[arg-type]
demo.launch(page, port)
print(next(number for number, function in page.fns.items() if function.name == "ask"), flush=True)
page.block_thread()
