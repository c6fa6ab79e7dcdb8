"""`e2p inspect`: what it says of a model is what a run would find, and what it refuses a run would refuse."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path
from typing import Any

import jax.monitoring
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf_writer import write_model
from helpers import hf_config, hf_model, load_backbone

from e2p_jax.backbone.weights import load, parameters
from e2p_jax.cli import main
from e2p_jax.plan.inspect import inspect


def changed(source: Path, out: Path, **keys: Any) -> Path:
    """The model directory without its weights, other keys in config.json; None takes one out."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    values = json.loads((out / "config.json").read_text()) | keys
    (out / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return out


def test_without_weights_it_says_what_a_run_finds(tiny_backbone: Path, tmp_path: Path) -> None:
    """Nothing is compiled."""
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None
    )
    found = inspect(str(changed(tiny_backbone, tmp_path / "bare")), None)
    assert not compiled and not found["refused"]
    leaves = parameters(load_backbone(tiny_backbone))
    assert found["memory"]["parameters"] == sum(leaf.size for leaf in leaves.values())
    assert found["memory"]["bytes"]["float32"] == sum(leaf.nbytes for leaf in leaves.values())
    assert {name: found["sizes"][name] for name in ("num_layers", "hidden_size", "num_kv_heads")} == {
        "num_layers": 2,
        "hidden_size": 32,
        "num_kv_heads": 1,
    }
    replies = "".join(piece["text"] for piece in found["sample"] if piece["target"])
    assert replies == " long walks.<|end|> old films, too.<|end|>"
    assert {piece["text"] for piece in found["sample"] if piece["stop"]} == {"<|end|>"} == set(found["stops"])


def test_memory_of_a_quantised_backbone_is_what_is_loaded(tiny_backbone: Path) -> None:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    loaded = load(tiny_backbone, dtype=np.dtype("bfloat16"), sharding=lambda path, shape: place, quantization="int4")
    held = sum(leaf.nbytes for leaf in parameters(loaded).values())
    assert inspect(str(tiny_backbone), None)["memory"]["bytes"]["int4"] == held


def test_what_differs_from_layer_to_layer(tiny_backbone: Path, tmp_path: Path) -> None:
    gemma = hf_config("gemma3_text", vocab_size=4096, num_hidden_layers=4).to_dict() | {"unsloth_version": "1"}
    place = changed(tiny_backbone, tmp_path / "gemma", rope_theta=None, hidden_act=None, **gemma)
    found = inspect(str(place), None)
    assert not found["refused"]
    assert found["windows"] == [{"layers": 2, "positions": 5}, {"layers": 2, "positions": None}]
    assert [rope["layers"] for rope in found["ropes"]] == [2, 2]
    assert found["ropes"][0]["wavelengths"] != found["ropes"][1]["wavelengths"]
    assert {"unsloth_version", "initializer_range"} <= set(found["inert_keys"])


def test_dense_layers_among_experts_are_named(
    tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = hf_config("qwen3_moe", vocab_size=4096, num_hidden_layers=6, mlp_only_layers=[0, 1, 4]).to_dict()
    place = changed(tiny_backbone, tmp_path / "mixed", rope_theta=None, **config)
    assert main(["inspect", str(place)]) == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "MLP 24, 3 of 6 experts, but in 3 dense layers (0 to 1, 4), MLP 48;" in out
    sizes = inspect(str(place), None)["sizes"]
    assert (sizes["dense_layers"], sizes["dense_size"]) == ([0, 1, 4], 48)


def test_linear_layers_have_no_window(tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a wrapper, as Qwen3.5 is published."""
    wrapper = hf_config("qwen3_5", vocab_size=4096).to_dict()
    place = changed(tiny_backbone, tmp_path / "qwen", **wrapper)
    plain = {key: value for key, value in wrapper.items() if key != "transformers_version"}
    (place / "config.json").write_text(json.dumps(plain))
    assert main(["inspect", str(place)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1 layers keep a state: 2 heads of keys, 4 of values" in said and "1 layers see everything" in said


def test_every_reason_to_refuse_is_there_at_once(
    tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"mystery": 1, "quantization_config": {"quant_method": "aqlm"}, "vocab_size": 100}
    place = changed(tiny_backbone, tmp_path / "bad", **bad)
    assert main(["inspect", str(place), "--json"]) == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    quantised, unknown, tokenizer = found["refused"]
    assert "quantised by 'aqlm'" in quantised and "'mystery'" in unknown and "belongs to another model" in tokenizer
    assert found["unknown_keys"] == ["mystery"] and found["sizes"]["vocab_size"] == 100
    assert "refused: " in err and "2 more reasons" in err and err.count("\n") == 1
    place = changed(tiny_backbone, tmp_path / "other", model_type="rwkv7")
    found = inspect(str(place), None)
    assert "sizes" not in found and "model_type 'rwkv7' is not supported" in found["refused"][0]
    assert found["sample"]  # its tokenizer is one all the same


def test_a_gguf_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_model(
        tmp_path / "m.gguf", hf_model(hf_config(hidden_size=64, intermediate_size=96)), GGMLQuantizationType.Q4_0
    )
    main(["inspect", str(path)])
    out = capsys.readouterr().out
    assert "llama, GGUF" in out and "Q4_0" in out and "parameters; 3 layers of width 64" in out
    assert main(["inspect", str(tmp_path / "absent")]) == 1


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks a hub for of a model, whose files are in `folder`."""

    folder: Path
    served: list[str]
    commit = "0" * 40

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = urllib.parse.urlparse(self.path).path
        if path.startswith("/api/models/org/model/tree/"):
            there = sorted(self.folder.iterdir())
            files = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in there]
            data = json.dumps(files).encode()
        elif path.startswith("/api/models/org/model"):
            files = [{"rfilename": file.name} for file in sorted(self.folder.iterdir())]
            data = json.dumps({"id": "org/model", "sha": self.commit, "siblings": files}).encode()
        elif path.startswith("/org/model/resolve/"):
            data = (self.folder / path.rsplit("/", 1)[1]).read_bytes()
            self.served.append(path.rsplit("/", 1)[1])
        else:
            self.send_error(404)
            return
        self.send_response(200)
        digest = hashlib.sha256(data).hexdigest()
        for name, value in {"Content-Length": len(data), "ETag": f'"{digest}"', "X-Repo-Commit": self.commit}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


def test_of_a_hub_s_model_no_weights_are_fetched(tiny_backbone: Path, tmp_path: Path) -> None:
    handler = type("Handler", (Hub,), {"folder": tiny_backbone, "served": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path),
        }
        command = [sys.executable, "-m", "e2p_jax", "inspect", "org/model", "--json"]
        done = subprocess.run(command, env={**os.environ, **place}, capture_output=True, text=True)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sizes"]["hidden_size"] == 32
    assert {"config.json", "tokenizer.json"} <= set(handler.served) and "model.safetensors" not in handler.served
