"""What any program or page can ask of the demo: refused with a reason, bounded, and in nobody's way."""

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

if importlib.util.find_spec("gradio") is None:
    pytest.skip("Gradio is absent: pip install 'e2p-jax[demo]'", allow_module_level=True)

from e2p_jax.export import demo, demo_access

ACTIVE = '<img src=x onerror="window.owned=1"><script>window.owned=1</script>"\'>\x1b[2J\u202e=HYPERLINK("x")'
PEOPLE = {"a": ("I live in Rome.",), "b": (), f"{ACTIVE} id": (f"{ACTIVE} context",), "long": ("x" * 20_000,)}
PEOPLE |= {f"user-{i}": () for i in range(20)}
GOOD: list[Any] = [["a", "b"], "hello", 0, 32, 0]


def wait(true: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, "the page did not come to it"
        time.sleep(0.05)
    return value


class Served(NamedTuple):
    """A page in front of a slow model, and the prompts, one for each token that it has made."""

    address: str
    ask: int
    made: Path

    def tokens(self, prompt: str) -> int:
        return self.made.read_text().split("\n").count(prompt)

    def join(self, data: Any, session: str) -> httpx.Response:
        body = {"data": data, "fn_index": self.ask, "session_hash": session}
        return httpx.post(f"{self.address}/gradio_api/queue/join", json=body, timeout=30)

    def events(self, session: str) -> Iterator[dict[str, Any]]:
        with httpx.stream("GET", f"{self.address}/gradio_api/queue/data?session_hash={session}", timeout=30) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))

    def last(self, data: Any, session: str) -> dict[str, Any]:
        assert self.join(data, session).status_code == 200
        with contextlib.closing(self.events(session)) as events:
            return next(event for event in events if event["msg"] == "process_completed")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = tmp_path_factory.mktemp("demo") / "made"
    made.touch()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, Path(__file__).parent / "slow_demo.py", str(port), json.dumps(PEOPLE), made]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert server.stdout is not None and server.stderr is not None
    try:
        line = server.stdout.readline()
        assert line, server.stderr.read()
        yield Served(f"http://127.0.0.1:{port}", int(line), made)
    finally:
        server.terminate()
        _, said = server.communicate(timeout=60)
    assert "Traceback" not in said, said


@pytest.mark.parametrize(
    ("method", "path", "headers", "code"),
    [
        ("GET", "/", {}, 200),
        ("GET", "/config", {"Host": "localhost:9"}, 200),
        ("GET", "/config", {"Host": "evil.example"}, 400),
        ("GET", "/", {"Host": "127.0.0.1.evil.example:7860"}, 400),
        ("POST", "/gradio_api/queue/join", {"Origin": "http://evil.example"}, 403),
        ("POST", "/gradio_api/queue/join", {"Origin": "http://127.0.0.1:1"}, 403),
        ("POST", "/gradio_api/queue/join", {"Origin": "null"}, 403),
        ("GET", "/config", {"Origin": "http://evil.example"}, 403),
        ("POST", "/gradio_api/upload", {}, 404),
        ("POST", "/gradio_api/upload/", {}, 404),
        ("POST", "/gradio_api/component_server", {}, 404),
        ("GET", "/gradio_api/file=/etc/passwd", {}, 404),
        ("GET", "/gradio_api/proxy=http://evil.example/", {}, 404),
        ("POST", "/gradio_api/run/ask", {}, 404),
        ("PUT", "/", {}, 404),
    ],
)
def test_only_the_pages_own_requests_are_served(
    served: Served, method: str, path: str, headers: dict[str, str], code: int
):
    assert httpx.request(method, served.address + path, headers=headers, timeout=30).status_code == code
    if "upload" in path:
        files = {"files": ("x.txt", b"x" * 1000)}
        assert httpx.post(served.address + path, files=files, timeout=30).status_code == code


def test_bodies_are_bounded(served: Served):
    assert served.join([["a", "b"], "x" * demo_access.LARGEST_BODY, 0, 32, 0], "s").status_code == 413

    def pieces() -> Iterator[bytes]:
        for _ in range(30):
            yield b"x" * 10_000

    answer = httpx.post(f"{served.address}/gradio_api/queue/join", content=pieces(), timeout=30)
    assert answer.status_code == 413
    host, port = served.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as slow:
        head = f"POST /gradio_api/queue/join HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 100\r\n\r\nx"
        slow.sendall(head.encode())
        assert b" 413 " in slow.recv(100)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, None, "Choose users of the list"),
        (0, ["a"], "Choose 2 to 8 users, each once"),
        (0, ["a"] * 200, "Choose 2 to 8 users, each once"),
        (0, [f"user-{i}" for i in range(9)], "Choose 2 to 8 users"),
        (0, ["a", "nobody"], "Choose users of the list"),
        (0, ["a", {"b": 1}], "Choose users of the list"),
        (0, "ab", "Choose users of the list"),
        (1, None, "Type a prompt"),
        (1, "  ", "Type a prompt"),
        (1, ["hello"], "Type a prompt"),
        (1, {"text": "hello"}, "Type a prompt"),
        (1, "x" * 5000, "5,000 characters; 4,000 are the most"),
        (1, "\ud800", "half a surrogate pair"),
        (2, None, "Temperature must be a number from 0 to 2"),
        (2, float("nan"), "Temperature must be a number from 0 to 2"),
        (2, "warm", "Temperature must be a number from 0 to 2"),
        (3, 10**9, "The longest reply must be a number from 1 to 128"),
        (3, True, "The longest reply must be a number from 1 to 128"),
        (4, -1, "The seed must be a number from 0 to 4294967295"),
    ],
)
def test_what_cannot_be_answered_is_said(place: int, value: Any, words: str):
    data = [*GOOD]
    data[place] = value
    with pytest.raises(demo.gradio.Error, match=words) as refused:
        demo.check(PEOPLE, *data)
    assert not refused.value.print_exception


def test_a_reason_reaches_whoever_asks(served: Served):
    for number, data in enumerate(([["a", "b"], None, 0, 32, 0], [["a"] * 200, "hello", 0, 32, 0])):
        event = served.last(data, f"s{number}")
        assert not event["success"] and event["output"]["error"].startswith(("Type", "Choose"))
    assert not served.tokens("hello")


def steady(value: Callable[[], Any], seconds: float = 1.0) -> Any:
    """The value when it has not changed for a while."""
    seen = value()
    while True:
        time.sleep(seconds)
        if seen == (seen := value()):
            return seen


def test_nobody_waits_for_a_long_request_and_one_that_nobody_reads_ends(served: Served):
    long: list[Any] = [["a", "b"], "a long one", 0, 128, 0]
    assert served.join(long, "long").status_code == 200
    with contextlib.closing(served.events("long")) as events:
        next(event for event in events if event["msg"] == "process_generating")
        assert served.last([["a", "b"], "a short one", 0, 2, 0], "short")["success"]
        assert served.tokens("a long one") < 128
        assert served.join(GOOD, "long").status_code == 200  # the same session, once more
        again = next(event for event in events if event["msg"] == "process_completed")
        assert again["output"]["error"] == "Your last prompt is still being answered."
    assert steady(lambda: served.tokens("a long one")) < 128
    assert not served.tokens("hello")
    assert served.last([["a", "b"], "hello", 0, 2, 0], "long")["success"]  # the session is free again


def test_a_reply_ends_in_time(served: Served):
    assert served.last([["a", "b"], "endless", 0, 128, 0], "s")["success"]
    assert 2 < served.tokens("endless") < 20


def test_hostile_text_is_text_in_the_page(served: Served, browser: Any, tmp_path: Path):
    browser.set_window_size(1280, 1400)
    browser.get(served.address)
    find, run = browser.find_elements, browser.execute_script
    wait(lambda: find("css selector", ".e2p-user h3"))
    box = browser.find_element("css selector", "#users input")
    for name in ("long", f"{ACTIVE} id"):
        box.click()
        wait(lambda: find("css selector", "[role=option]"))
        (option,) = (e for e in find("css selector", "[role=option]") if e.text.startswith(name[:4]))
        option.click()
    wait(lambda: len(find("css selector", ".e2p-user h3")) == 4)
    browser.find_element("css selector", "#prompt textarea").send_keys("hello")
    browser.find_element("css selector", "#ask").click()
    reply = "return document.querySelectorAll('.e2p-way p')[9].textContent"
    wait(lambda: f"{ACTIVE} id 3" in run(reply))
    titles = run("return [...document.querySelectorAll('.e2p-user h3')].map(e => e.textContent)")
    assert titles[3] == f"{ACTIVE} id"
    assert run("return window.owned") is None
    assert run("return document.querySelectorAll('#answers img, #answers script, #users img').length") == 0
    assert run("return document.documentElement.scrollWidth <= innerWidth")
    browser.save_screenshot(str(tmp_path / "demo.png"))


def test_the_queue_is_bounded(served: Served):
    """The last here: what waits is answered, or ends with the server."""
    codes = [served.join([["a", "b"], "endless", 0, 128, 0], f"s{n}").status_code for n in range(30)]
    assert codes[:4] == [200] * 4 and codes[-1] == 503
