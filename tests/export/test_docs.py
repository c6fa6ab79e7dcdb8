"""The examples in docs/, run as they stand."""

import json
import re
import shlex
import threading
import urllib.parse
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from pdoc.__main__ import cli as pdoc_command
from test_engines import continue_in_torch, load_prompt_embeds

from e2p_jax.cli import main
from e2p_jax.datasets.records import Record
from e2p_jax.evaluate.generate import Sampling, generate, vectors_for
from e2p_jax.train.run import Run, open_run

DOCS = Path(__file__).parent.parent.parent / "docs"


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)


def commands(name: str) -> list[list[str]]:
    """The arguments of every `e2p` command of a page."""
    return [shlex.split(line)[1:] for line in re.findall(r"^e2p .*$", (DOCS / name).read_text(), re.MULTILINE)]


@pytest.fixture
def run(make_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run at runs/quickstart of the working directory."""
    run = make_run()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(run.directory)
    monkeypatch.chdir(tmp_path)
    return run


def test_library_example(run: Run):
    seen: dict[str, Any] = {}
    exec("".join(python_blocks("library.md")), seen)
    assert seen["prefixes"].shape == (2, 1, 32) and seen["vectors"].shape == (2, 64)
    assert seen["nats"].shape == (2,) and (seen["nats"] > 0).all() and seen["nats"][0] != seen["nats"][1]
    assert len(seen["replies"]) == 2 and all(isinstance(reply, str) for reply in seen["replies"])
    assert len(python_blocks("library.md")[1].strip().splitlines()) == 5


def test_api_reference_is_made_from_the_docstrings(tmp_path: Path):
    """By the page's command, without the sources; annotations of other libraries (optax, TFDS) cannot be evaluated."""
    (line,) = re.findall(r"^pdoc (.*)$", (DOCS / "library.md").read_text(), re.MULTILINE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Error parsing type annotation")
        pdoc_command([*shlex.split(line.replace("site", str(tmp_path / "site"))), "--no-show-source"])
    page = (tmp_path / "site" / "e2p_jax" / "evaluate" / "generate.html").read_text()
    assert "The replies as they grow" in page and '<h6 id="yields">Yields:</h6>' in page
    assert len(list((tmp_path / "site").rglob("*.html"))) > 100


@pytest.fixture
def server(lively_backbone: Path) -> Iterator[str]:
    """An HTTP server that reads completions as vLLM documents it, and answers with the backbone in torch."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert urllib.parse.urlparse(self.path).path == "/v1/completions" and body["model"] == "my-model"
            (text,) = continue_in_torch(lively_backbone, [load_prompt_embeds(body["prompt_embeds"], 32)])
            answer = json.dumps({"choices": [{"text": text}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{listening.server_port}"
    listening.shutdown()
    thread.join()
    listening.server_close()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's use of it
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_export_examples(run: Run, lively_backbone: Path):
    data, users = run.inputs.config.data, ["user-3", "user-7"]
    places = {"TABLE": str(data.embeddings), "records.jsonl": data.path}
    for arguments in commands("export.md"):
        assert main([places.get(word, word) for word in arguments]) == 0
    vectors = vectors_for(run, users, users, "e2p")
    np.save("vectors.npy", vectors)
    seen: dict[str, Any] = {}
    exec("".join(python_blocks("export.md")).replace("BACKBONE", str(lively_backbone)), seen)
    asked = [Record(user, (), ({"role": "user", "content": "do you have any pets?"},)) for user in users]
    wanted = generate(run, asked, vectors, "e2p", Sampling(max_new_tokens=12))
    assert [reply.strip() for reply in seen["replies"]] == wanted
    said = seen["tokenizer"].decode(seen["answer"][0, seen["one"]["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said.strip() == wanted[0]
    soft = seen["personal"].get_prompt(batch_size=1)[0, 1:].detach().numpy()  # behind the prompt's first token
    ours = nnx.merge(run.model.graph, run.model.params).projector(vectors[:1])[0]
    np.testing.assert_allclose(soft, ours, rtol=1e-5, atol=1e-6)
    assert open_run(Path("runs/imported")).step == 0


def test_serving_examples(run: Run, server: str, capsys: pytest.CaptureFixture[str]):
    for arguments in commands("serving.md"):
        if arguments[0] == "serve":
            continue  # it ends when it is told to
        given = [run.inputs.config.data.embeddings if word == "TABLE" else word for word in arguments]
        assert main([str(word) for word in given]) == 0
    assert len(json.loads(Path("body.json").read_text())["input_embeds"][0]) == 32
    lookup, request, _ = python_blocks("serving.md")
    seen: dict[str, Any] = {}
    exec(lookup, seen)
    assert seen["prefix"].shape == (2, 1, 32) and np.isfinite(seen["prefix"].astype(np.float32)).all()
    capsys.readouterr()
    exec(request.replace("http://localhost:8000", server), {})
    asked = Record("user-3", (), ({"role": "user", "content": "do you have any pets?"},))
    vectors = vectors_for(run, ["user-3"], [""], "e2p")
    assert capsys.readouterr().out.strip() == generate(run, [asked], vectors, "e2p", Sampling(max_new_tokens=12))[0]


def test_the_page_of_faults_names_tests_that_are_there() -> None:
    tests, missing, path = Path(__file__).parents[1], [], ""
    for name in re.findall(r"`([\w/.]*::\w+)`", (tests.parent / "docs" / "faults.md").read_text(encoding="utf-8")):
        file, _, test = name.partition("::")
        path = file or path
        if not re.search(rf"^def {test}\(", (tests / path).read_text(encoding="utf-8"), re.MULTILINE):
            missing.append(name)
    assert path and not missing
