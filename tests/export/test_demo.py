"""Replies that grow token by token, and the page that shows them, in a headless Chromium."""

import dataclasses
import importlib.util
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from e2p_jax.config import Condition
from e2p_jax.datasets.prepared import load_records
from e2p_jax.datasets.records import Record
from e2p_jax.evaluate.generate import Sampling, generate, stream, vectors_for
from e2p_jax.train.run import Run

PROMPT = "where do you live, and do you have any pets?"
USERS = ["user-1", "user-2", "user-1"]
CONDITIONS: tuple[Condition, ...] = ("e2p", "e2p", "none")
# What the answers' element has held, one entry for every change that the page has drawn.
WATCH = """
window.seen = [];
new MutationObserver(() => window.seen.push([...document.querySelectorAll('.e2p-way p')].map(p => p.innerText)))
  .observe(document.querySelector('#answers'), {childList: true, subtree: true, characterData: true});
"""


def test_the_last_of_a_stream_is_what_generate_says(make_run: Callable):
    """One batch of prompts with and without slots; a token more each time, until all have stopped."""
    run, sampling = make_run("in_chat", 1, "mlp"), Sampling(12, temperature=1.0, top_k=50, seed=3)
    asked = [Record(user, (), ({"role": "user", "content": PROMPT},), source=user) for user in USERS]
    vectors = vectors_for(run, USERS, USERS, "e2p")
    seen = list(stream(run, asked, vectors, CONDITIONS, sampling))
    own, without = (generate(run, asked, vectors, condition, sampling) for condition in ("e2p", "none"))
    assert seen[-1] == [*own[:2], without[2]]
    assert len(set(seen[-1])) > 1 and 2 < len(seen) <= 12
    lengths = np.array([[len(text) for text in texts] for texts in seen])
    assert (np.diff(lengths.sum(axis=1)) >= 0).all() and lengths[0].sum() < lengths[-1].sum()


def test_a_run_that_reads_the_text_answers_with_it(make_run: Callable, tmp_path: Path):
    """Trained with the context spelled out, and on records of which one is bad and was skipped."""
    demo = pytest.importorskip("e2p_jax.export.demo", exc_type=ImportError)
    run: Run = make_run("in_chat", 1, "mlp")
    lines = Path(run.inputs.config.data.path).read_text()
    records = tmp_path / "records.jsonl"
    records.write_text(lines + "{\n")
    data = {"path": str(records), "condition": "e2p+text", "on_bad_record": "skip", "max_bad_share": 0.5}
    inputs = dataclasses.replace(run.inputs, config=run.inputs.config.change(data=data))
    run = dataclasses.replace(run, inputs=inputs)
    people, sampling = demo.find_people(run), Sampling(max_new_tokens=12)
    users = list(people)[:2]
    *_, ((own, bare, other), (_, _, swapped)) = demo.answers(run, people, users, PROMPT, sampling)
    asked = [Record(user, people[user], ({"role": "user", "content": PROMPT},)) for user in users]
    wanted = generate(run, asked, vectors_for(run, users, users, "e2p+text"), "e2p+text", sampling)
    assert [own, other] == wanted and swapped == own
    assert bare == generate(run, asked[:1], vectors_for(run, users[:1], users[:1], "none"), "none", sampling)[0] != own


@pytest.fixture
def page(make_run: Callable) -> Iterator[tuple[Run, str]]:
    """A run, and where `e2p demo` serves it."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("Gradio is absent: pip install 'e2p-jax[demo]'")
    run: Run = make_run()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["demo", str(run.directory), "--checkpoint", "last", "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, "-m", "e2p_jax", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert server.stdout is not None and server.stderr is not None
    try:
        address = server.stdout.readline().strip()
        assert address == f"http://127.0.0.1:{port}", server.stderr.read()
        with pytest.raises(OSError):  # loopback alone
            socket.create_connection(("127.0.0.2", port), timeout=5).close()
        yield run, address
    finally:
        server.terminate()
        server.communicate(timeout=60)


def wait(true: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, "the page did not come to it"
        time.sleep(0.05)
    return value


def texts(browser: Any, selector: str) -> list[str]:
    return [element.text for element in browser.find_elements("css selector", selector)]


def test_page(page: tuple[Run, str], browser: Any):
    run, address = page
    browser.get(address)
    cards = wait(lambda: texts(browser, ".e2p-user h3"))
    people = list(load_records(run.inputs.config.data.path, "validation"))
    assert cards == [people[0].user_id, people[1].user_id]
    assert texts(browser, ".e2p-context") == [" ".join(person.context) for person in people[:2]]
    titles = texts(browser, ".e2p-way h4")
    assert titles[:3] == ["with their own soft token", "without", f"with the soft token of {cards[1]}"]
    browser.execute_script(WATCH)
    browser.find_element("css selector", "#prompt textarea").send_keys(PROMPT)
    browser.find_element("css selector", "#ask").click()

    asked = [Record(user, (), ({"role": "user", "content": PROMPT},)) for user in cards]
    vectors, sampling = vectors_for(run, cards, cards, "e2p"), Sampling(max_new_tokens=32)
    own, without = (generate(run, asked, vectors, condition, sampling) for condition in ("e2p", "none"))
    wanted = [" ".join(text.split()) for text in (own[0], without[0], own[1], own[1], without[1], own[0])]
    wait(lambda: [" ".join(text.split()) for text in texts(browser, ".e2p-way p")] == wanted)
    assert own[0] != own[1] != without[1]
    seen = [state for state in browser.execute_script("return window.seen") if len(state) == 6]
    growing = sorted({sum(map(len, state)) for state in seen})
    assert len(growing) > 5, f"the replies did not stream: {growing}"

    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            own = (
                address,
                "data:",
                "blob:",
                "chrome:",
                "chrome-untrusted:",
            )  # the last two are the browser's first page
            assert message["params"]["request"]["url"].startswith(own)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
