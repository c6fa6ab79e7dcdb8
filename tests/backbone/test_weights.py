"""Hugging Face directories in and out: dtypes, shards, meshes, broken files, and the way back."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from helpers import (
    assert_close,
    hf_config,
    hf_logits,
    hf_model,
    load_backbone,
    logits,
    mesh_of,
    random_tokens,
    whole_rows,
)
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from e2p_jax.backbone import tensor_files
from e2p_jax.backbone.convert import convert
from e2p_jax.backbone.decoder import Decoder
from e2p_jax.backbone.tensor_files import Checkpoint
from e2p_jax.backbone.weights import load, resolve, save
from e2p_jax.errors import UserError
from e2p_jax.files import write_text

TOKENS = random_tokens(2, 20)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return hf_model(hf_config("qwen2"))  # has biases and a head of its own


@pytest.fixture
def directory(model: torch.nn.Module, tmp_path: Path) -> Path:
    """A fresh copy of the model, one file, float32."""
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def parameters(decoder: Decoder) -> dict[str, jax.Array]:
    return {"/".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(nnx.state(decoder))}


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def rewrite(directory: Path, change: Any) -> None:
    """Loads the one file, lets `change` edit the dict of tensors, and writes it back."""
    values = tensors(directory)
    change(values)
    save_file(values, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_the_file(model: torch.nn.Module, tmp_path: Path, dtype: torch.dtype) -> None:
    hf_model(model.config).to(dtype).save_pretrained(tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = logits(load_backbone(tmp_path), *whole_rows(TOKENS))
    assert_close(ours, hf_logits(reference, input_ids=TOKENS.astype(np.int64)))


def test_dtype_of_the_parameters(model: torch.nn.Module, directory: Path) -> None:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    decoder = load(directory, dtype=jnp.dtype("bfloat16"), sharding=lambda path, shape: sharding)
    assert {value.dtype for value in parameters(decoder).values()} == {jnp.dtype("bfloat16")}
    rounded = model.get_input_embeddings().weight.detach().to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(np.asarray(decoder.embedding[...], np.float32), rounded)


def test_shards_are_one_model(model: torch.nn.Module, directory: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, shards = parameters(load_backbone(directory)), parameters(load_backbone(tmp_path / "shards"))
    assert whole.keys() == shards.keys()
    for path, value in whole.items():
        np.testing.assert_array_equal(shards[path], value)
    assert Checkpoint(directory).fingerprint() == Checkpoint(tmp_path / "shards").fingerprint()


def test_fingerprint_is_kept_while_files_stay(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken from the user's cache, until a file is written again, even with the same length and time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    time.sleep(0.1)  # what has just been written may still change without its time changing
    found = Checkpoint(directory).fingerprint()
    (kept,) = (tmp_path / "cache" / "e2p_jax" / "fingerprints").iterdir()
    assert kept.read_text().startswith(found)
    with monkeypatch.context() as patched:
        patched.setattr(tensor_files, "fingerprint", lambda _: "read again")
        assert Checkpoint(directory).fingerprint() == found
    path = directory / "model.safetensors"
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = Checkpoint(directory).fingerprint()
    assert changed != found
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert Checkpoint(directory).fingerprint() == changed


@pytest.mark.parametrize("damage", ["", "cut", "short", "flip", "another's", "text", "binary"])
def test_a_damaged_kept_fingerprint_is_found_again(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    time.sleep(0.1)
    found = Checkpoint(directory).fingerprint()
    (kept,) = (tmp_path / "cache" / "e2p_jax" / "fingerprints").iterdir()
    whole = kept.read_text()
    other = ("0" if found[0] != "0" else "1") + whole[1:]
    kept.write_bytes(
        {
            "": b"",
            "cut": whole[:40].encode(),
            "short": found.encode(),
            "flip": other.encode(),
            "another's": f"{'a' * 64} {'b' * 64}\n".encode(),
            "text": b"fingerprint",
            "binary": b"\xff" * len(whole),
        }[damage]
    )
    assert Checkpoint(directory).fingerprint() == found
    assert kept.read_text() == whole


def test_a_file_that_is_replaced_while_it_is_read_keeps_no_fingerprint(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was opened is not what stands there when its fingerprint is known."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    opened, path = Checkpoint(directory), directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    (tmp_path / "other").write_bytes(content)
    (tmp_path / "other").replace(path)
    time.sleep(0.1)
    first = opened.fingerprint()
    assert Checkpoint(directory).fingerprint() != first


def test_eight_at_once_keep_a_whole_fingerprint(tmp_path: Path) -> None:
    """Each writes under a name of its own; whoever reads meanwhile reads nothing, or all of a version."""
    place, texts = tmp_path / "kept", [str(n) * 200_000 for n in range(8)]
    seen: set[str] = set()
    with ThreadPoolExecutor(9) as pool:
        writers = [pool.submit(lambda text=text: [write_text(place, text) for _ in range(20)]) for text in texts]
        while not all(writer.done() for writer in writers):
            if place.is_file():
                seen.add(place.read_text())
        for writer in writers:
            writer.result()
    assert seen <= set(texts)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_fingerprint_sees_one_weight(directory: Path) -> None:
    def nudge(values: dict[str, torch.Tensor]) -> None:
        values["model.layers.2.mlp.up_proj.weight"][3, 5] += 1e-6

    before = Checkpoint(directory).fingerprint()
    rewrite(directory, lambda values: None)
    assert Checkpoint(directory).fingerprint() == before
    rewrite(directory, nudge)
    assert Checkpoint(directory).fingerprint() != before


def spread(path: str, fsdp: str | None, tensor: str | None) -> P:
    """Where each parameter's dimensions go, written out by hand for the qwen2 model above."""
    name = path.removeprefix("layers/")
    if name in ("q", "k", "v", "gate", "up"):
        return P(None, tensor, fsdp)
    if name in ("o", "down"):
        return P(None, fsdp, tensor)
    if name in ("embedding", "head"):
        return P(None, fsdp)  # 97 rows are divided by nothing
    return P()


@pytest.mark.parametrize(
    ("axes", "fsdp", "tensor"),
    [
        ({"fsdp": 4}, "fsdp", None),
        ({"data": 2, "tensor": 2}, None, "tensor"),
        ({"fsdp": 2, "tensor": 2}, "fsdp", "tensor"),
    ],
    ids=str,
)
def test_meshes(directory: Path, axes: dict[str, int], fsdp: str | None, tensor: str | None) -> None:
    mesh = mesh_of(**axes)
    one, sharded = load_backbone(directory), load_backbone(directory, mesh)
    for path, value in parameters(sharded).items():
        rule = jax.sharding.NamedSharding(mesh, spread(path, fsdp, tensor))
        assert value.sharding.is_equivalent_to(rule, value.ndim), path
        np.testing.assert_array_equal(value, parameters(one)[path])
    tokens = random_tokens(4, 20)
    expected = logits(one, *whole_rows(tokens))
    with jax.set_mesh(mesh):
        assert_close(logits(sharded, *whole_rows(tokens)), expected, 1e-5)


def test_all_disagreements_are_reported_together(directory: Path) -> None:
    def spoil(values: dict[str, torch.Tensor]) -> None:
        del values["model.layers.1.self_attn.k_proj.bias"], values["lm_head.weight"]
        values["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
        values["model.norm.weight"] = torch.ones(33)

    rewrite(directory, spoil)
    with pytest.raises(UserError) as error:
        load_backbone(directory)
    assert str(error.value) == (
        f"{directory}: weights and config.json disagree: missing lm_head.weight; "
        "missing model.layers.1.self_attn.k_proj.bias; unexpected model.layers.0.self_attn.q_norm.weight; "
        "model.norm.weight has shape (33,), config.json says (32,)"
    )


def test_a_tensor_in_two_shards_joins_the_report(model: torch.nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    values, name = load_file(second), next(iter(load_file(first)))
    lost = sorted(values)[0]
    save_file({n: t for n, t in values.items() if n != lost} | {name: torch.ones(2)}, second, metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        load_backbone(tmp_path)
    shape = tuple(load_file(first)[name].shape)
    assert str(error.value) == (
        f"{tmp_path}: weights and config.json disagree: missing {lost}; {name} also stands in {second.name}; "
        f"{name} has shape (2,), config.json says {shape}"
    )


def test_a_tied_head_may_be_saved_as_well_but_not_differ(tmp_path: Path) -> None:
    model = hf_model(hf_config(tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in tensors(tmp_path)
    expected = hf_logits(model, input_ids=TOKENS.astype(np.int64))

    def add_head(values: dict[str, torch.Tensor], change: float) -> None:
        values["lm_head.weight"] = values["model.embed_tokens.weight"] + change

    rewrite(tmp_path, lambda values: add_head(values, 0.0))
    assert_close(logits(load_backbone(tmp_path), *whole_rows(TOKENS)), expected)
    rewrite(tmp_path, lambda values: add_head(values, 1e-3))
    with pytest.raises(UserError, match=r"lm_head\.weight is not model\.embed_tokens\.weight"):
        load_backbone(tmp_path)


def test_rotary_buffers_of_old_exports_are_ignored(directory: Path) -> None:
    rewrite(directory, lambda v: v.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load_backbone(directory)


def test_gpt2_as_it_was_published(tmp_path: Path) -> None:
    """Written from the model without its head: names lack `transformer.`, and causal masks are among the tensors."""
    model = hf_model(hf_config("gpt2"))
    model.save_pretrained(tmp_path)
    values = {name.removeprefix("transformer."): tensor for name, tensor in tensors(tmp_path).items()}
    masks = {f"h.{i}.attn.{name}": torch.ones(1) for i in range(3) for name in ("bias", "masked_bias")}
    save_file(values | masks, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = hf_logits(model, input_ids=TOKENS.astype(np.int64))
    assert_close(logits(load_backbone(tmp_path), *whole_rows(TOKENS)), expected)
    del values["h.1.mlp.c_fc.weight"]
    values["h.0.attn.c_attn.weight"] = torch.ones(32, 95)
    save_file(values, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        load_backbone(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: weights and config.json disagree: missing h.1.mlp.c_fc.weight; "
        "h.0.attn.c_attn.weight has shape (32, 95), config.json says (32, 96)"
    )


@pytest.mark.parametrize("family", ["phi3", "gpt2", "gemma2", "olmo2"])
def test_tensors_of_several_parameters_come_apart_and_back(tmp_path: Path, family: str) -> None:
    """Fused, transposed and further norms: the same on one device and on four, and the same bytes when saved."""
    source, out = tmp_path / "source", tmp_path / "out"
    hf_model(hf_config(family)).save_pretrained(source)
    one, four = load_backbone(source), load_backbone(source, mesh_of(fsdp=2, tensor=2))
    for path, value in parameters(four).items():
        np.testing.assert_array_equal(value, parameters(one)[path])
    layers, rows, columns = parameters(one)["layers/q"].shape
    assert parameters(four)["layers/q"].addressable_shards[0].data.shape == (layers, rows // 2, columns // 2)
    save(four, source, out, jnp.dtype("float32"))
    before, after = tensors(source), tensors(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_experts_of_a_layer_in_one_tensor_come_apart(tmp_path: Path) -> None:
    """As Qwen3.5 is published; transformers saves each by itself."""
    hf_model(hf_config("qwen3_5_moe_text")).save_pretrained(tmp_path / "each")
    shutil.copytree(tmp_path / "each", tmp_path / "together")
    values = load_file(tmp_path / "each" / "model.safetensors")
    for layer in range(2):
        front = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([values.pop(f"{front}.{n}.{name}_proj.weight") for n in range(6)])
            for name in ("gate", "up", "down")
        )
        values |= {f"{front}.gate_up_proj": torch.cat([gate, up], dim=1), f"{front}.down_proj": down}
    save_file(values, tmp_path / "together" / "model.safetensors", metadata={"format": "pt"})
    one, other = (parameters(load_backbone(tmp_path / name)) for name in ("each", "together"))
    for path, value in one.items():
        np.testing.assert_array_equal(value, other[path])
    convert(tmp_path / "together", tmp_path / "plain", "org/model", None, "float32")
    for name, tensor in load_file(tmp_path / "each" / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "plain" / "model.safetensors")[name], tensor)


@pytest.mark.parametrize("keep", [0, 5, 400, -1])
def test_a_truncated_file_is_named(directory: Path, keep: int) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors: missing or damaged safetensors") as error:
        load_backbone(directory)
    assert str(path) in str(error.value)


def test_broken_directories(model: torch.nn.Module, tmp_path: Path) -> None:
    model.config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.safetensors: not found"):
        load_backbone(tmp_path)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    second = sorted(tmp_path.glob("*.safetensors"))[1]
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(UserError, match=rf"{second.name}: not found"):
        load_backbone(tmp_path)
    second.write_bytes(sorted(tmp_path.glob("*.safetensors"))[0].read_bytes())
    with pytest.raises(UserError, match=r"missing .*; model\.\S+ also stands in model-00002-of-"):
        load_backbone(tmp_path)
    second.write_bytes(content)
    load_backbone(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    outside = {"weight_map": {"a": "../model-00001-of-00002.safetensors"}}
    for text, reason in [
        ("{", "line 1: malformed JSON"),
        ("[" * 100_000, "nested too deep"),
        ("[]", "must be a JSON object"),
        ("{}", "its weight_map must name a file for each tensor"),
        ('{"weight_map": 3}', "its weight_map must name a file for each tensor"),
        ('{"weight_map": {"a": 3}}', "its weight_map must name a file for each tensor"),
        ('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', "key 'a' stands twice"),
        (json.dumps(outside), "which is no safetensors file beside it"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "which is no safetensors file beside it"),
        (json.dumps({"weight_map": {"a": f"{'a' * 300}.safetensors"}}), "which is no safetensors file beside it"),
        ('{"weight_map": {"a": "absent.safetensors"}}', r"absent\.safetensors: not found"),
    ]:
        index.write_text(text)
        with pytest.raises(UserError, match=reason) as error:
            Checkpoint(tmp_path)
        assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_save_gives_the_same_bytes_back(tmp_path: Path, dtype: str, tied: bool) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    hf_model(hf_config(tie_word_embeddings=tied)).to(getattr(torch, dtype)).save_pretrained(source)
    (source / "tokenizer_config.json").write_text("{}")
    sharding = jax.sharding.NamedSharding(mesh_of(fsdp=4), P())
    save(load(source, dtype=jnp.dtype(dtype), sharding=lambda *_: sharding), source, out, jnp.dtype(dtype))
    before, after = tensors(source), tensors(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert Checkpoint(out).fingerprint() == Checkpoint(source).fingerprint()
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in source.iterdir())
    models = [transformers.AutoModelForCausalLM.from_pretrained(d, dtype="auto") for d in (source, out)]
    assert models[1].dtype == getattr(torch, dtype)
    first, second = (hf_logits(m, input_ids=TOKENS.astype(np.int64)) for m in models)
    np.testing.assert_array_equal(first, second)


def test_save_in_another_dtype_says_so(directory: Path, tmp_path: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    save(load_backbone(directory), directory, tmp_path / "out", jnp.dtype("bfloat16"))
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (saved["dtype"], saved.get("torch_dtype")) == ("bfloat16", None)
    for name, tensor in tensors(tmp_path / "out").items():
        assert torch.equal(tensor, tensors(directory)[name].to(torch.bfloat16))


def test_resolve(tmp_path: Path) -> None:
    assert resolve(str(tmp_path), None) == tmp_path
    with pytest.raises(UserError, match="no such directory, and not a hub id like org/model"):
        resolve(str(tmp_path / "nowhere"), None)
    with pytest.raises(UserError) as error:
        resolve("org/absent-model", "v2")  # the tests run offline
    assert "'org/absent-model': not a directory here, not in " in str(error.value)
    assert "run `hf download org/absent-model --revision v2 --local-dir DIR`" in str(error.value)


def test_hub_cache(model: torch.nn.Module, directory: Path, tmp_path: Path) -> None:
    """The layout that huggingface_hub leaves behind, two revisions of one model: found by branch, tag or commit."""
    cache = tmp_path / "hub"
    place = cache / "models--org--model"
    other = hf_model(model.config, seed=1)
    other.save_pretrained(tmp_path / "second")
    commits = {"main": "a" * 40, "v2": "b" * 40}
    for (name, commit), source in zip(commits.items(), [directory, tmp_path / "second"], strict=True):
        for folder in ("refs", "blobs", f"snapshots/{commit}"):
            (place / folder).mkdir(parents=True, exist_ok=True)
        (place / "refs" / name).write_text(commit)
        for file in source.iterdir():
            blob = hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copyfile(file, place / "blobs" / blob)
            (place / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{blob}")
    script = (
        "import sys\nfrom pathlib import Path\nfrom e2p_jax.backbone.tensor_files import Checkpoint\n"
        "from e2p_jax.backbone.weights import resolve\n"
        "for revision in (None, 'v2', sys.argv[1]):\n"
        "    directory = resolve('org/model', revision)\n"
        "    print(directory.name, Checkpoint(directory).fingerprint())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, commits["main"]],
        env={**os.environ, "HF_HUB_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = (Checkpoint(d).fingerprint() for d in (directory, tmp_path / "second"))
    assert run.stdout.split() == [commits["main"], first, commits["v2"], second, commits["main"], first]
