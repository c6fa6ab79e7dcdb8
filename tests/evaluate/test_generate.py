"""Generation against transformers and the golden text; several users a batch; sampling."""

import dataclasses
import functools
import io
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
import torch
from flax import nnx
from helpers import SIZES, USER_WIDTH, mesh_of, prefix_model
from jax.sharding import Mesh
from transformers import AutoModelForCausalLM

from e2p_jax.backbone import weights
from e2p_jax.cli import main
from e2p_jax.config import MeshConfig
from e2p_jax.data.encode import Example, load_tokenizer
from e2p_jax.datasets import synthetic
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError
from e2p_jax.evaluate.generate import (
    SHORTEST_PROMPT,
    Decoding,
    Draws,
    _advance_once,
    _decode,
    _left_padded,
    _opened,
    _start_once,
    choose,
    generate,
    generate_tokens,
    padded_length,
    stream,
)
from e2p_jax.evaluate.users import show_answers
from e2p_jax.options import Sampling
from e2p_jax.parallel.mesh import make_mesh, param_sharding
from e2p_jax.plan.hlo import Program
from e2p_jax.prefix import mlp
from e2p_jax.prefix.model import PrefixModel
from e2p_jax.prefix.projector import Projector
from e2p_jax.train.partition import path_name
from e2p_jax.train.run import open_run

WIDTH = 6


def load_model(directory: Path, num_tokens: int = 1) -> PrefixModel:
    sharding = functools.partial(param_sharding, make_mesh(MeshConfig()))
    decoder = weights.load(directory, dtype=jnp.dtype("float32"), sharding=sharding)
    projector = Projector(
        mlp.Settings(num_tokens=num_tokens, hidden_size=8, dropout=0.0),
        embedding_width=WIDTH,
        model_width=decoder.config.hidden_size,
        rngs=nnx.Rngs(1),
    )
    return PrefixModel(decoder, projector)


def run(
    model: PrefixModel, prompts: list[Example], vectors: np.ndarray, num_tokens: int = 1, **options
) -> list[list[int]]:
    graph, state = nnx.split(model)
    options = {"sampling": Sampling(max_new_tokens=12), "stops": (), "pad": 0, **options}
    return generate_tokens(graph, nnx.to_pure_dict(state), prompts, vectors, num_tokens=num_tokens, **options)[0]


def prompt(tokens: list[int], slot_start: int = -1, num_tokens: int = 1) -> Example:
    starts = (slot_start,) if slot_start >= 0 else ()
    for start in starts:
        tokens = tokens[:start] + [0] * num_tokens + tokens[start:]
    return Example(np.array(tokens, np.int32), np.zeros(len(tokens), bool), starts, "user")


def test_golden_text(shared: Path):
    """Greedy decoding from `<s>` alone, token for token."""
    directory = shared / "backbones" / "stories260k"
    tokenizer = load_tokenizer(directory, 512)
    golden = (directory / "greedy_199_tokens.txt").read_text()
    expected = tokenizer(golden.strip())["input_ids"]
    expected = expected[1:] if expected[0] == 1 else expected
    sampling = Sampling(max_new_tokens=199)
    tokens = run(load_model(directory), [prompt([1])], np.zeros((1, WIDTH), np.float32), sampling=sampling)[0]
    assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == golden.strip()
    assert tokens == expected[:199] and len(tokens) == 199


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_batch_of_users_equals_transformers(tiny_backbone: Path, num_tokens: int):
    """Different users, prompts of different lengths, left padding: each row as transformers generates it alone."""
    model = load_model(tiny_backbone, num_tokens)
    reference = AutoModelForCausalLM.from_pretrained(tiny_backbone, dtype=torch.float32).eval()
    vectors = np.random.default_rng(0).normal(size=(3, WIDTH)).astype(np.float32)
    texts = [[1, 40, 50, 60], [1, 70, 71, 72, 73, 74, 75, 76], [1, 9]]
    places = [0, 1, 0]
    prompts = [prompt(text, place, num_tokens) for text, place in zip(texts, places, strict=True)]
    ours = run(model, prompts, vectors, num_tokens)
    for text, place, vector, tokens in zip(texts, places, vectors, ours, strict=True):
        soft = torch.tensor(np.array(model.projector(jnp.asarray(vector))))
        embedded = reference.get_input_embeddings()(torch.tensor(text))
        embedded = torch.cat([embedded[:place], soft, embedded[place:]])[None]
        with torch.no_grad():
            expected = reference.generate(
                inputs_embeds=embedded,
                attention_mask=torch.ones(embedded.shape[:2], dtype=torch.long),
                max_new_tokens=12,
                min_new_tokens=12,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )[0]
        assert tokens == expected.tolist()


def test_stop_token_ends_a_row_and_only_that_row(tiny_backbone: Path):
    model = load_model(tiny_backbone)
    vectors = np.random.default_rng(0).normal(size=(2, WIDTH)).astype(np.float32)
    prompts = [prompt([1, 40, 50], 0), prompt([1, 70, 71], 0)]
    free = run(model, prompts, vectors)
    stop = free[0][4]
    stopped = run(model, prompts, vectors, stops=(stop,))
    assert stopped[0] == free[0][: free[0].index(stop)]
    expected = free[1][: free[1].index(stop)] if stop in free[1] else free[1]
    assert stopped[1] == expected


def drawn(logits: jax.Array, **sampling: Any) -> np.ndarray:
    asked = Sampling(**sampling)
    return np.asarray(choose(logits, jax.random.key(0), Draws.of(asked), asked.top_k))


def test_no_value_of_sampling_compiles_anything_anew(tiny_backbone: Path):
    model = load_model(tiny_backbone)
    vectors = np.zeros((1, WIDTH), np.float32)
    values = [{}, {"temperature": 0.7}, {"temperature": 2.0, "top_p": 0.5}, {"temperature": 2.0, "seed": 5}]
    replies = [run(model, [prompt([1, 40])], vectors, sampling=Sampling(max_new_tokens=12)) for _ in "a"]
    compiled = _decode._cache_size()
    replies += [run(model, [prompt([1, 40])], vectors, sampling=Sampling(12, **more)) for more in values]
    assert _decode._cache_size() == compiled
    assert replies[0] == replies[1] and len({str(reply) for reply in replies}) == len(values)


@pytest.mark.parametrize("family", ["llama", "qwen3_5_text"])
def test_a_cache_is_held_once(family: str):
    """A step writes where the cache stands: donated, it needs no other room but what a layer itself keeps."""
    hybrid = {"full_attention_interval": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    changes = {} if family == "llama" else hybrid
    backbone = prefix_model(model_type=family, num_hidden_layers=8, max_position_embeddings=2048, **changes).backbone
    graph, state = nnx.split(backbone)
    x, ones = jax.ShapeDtypeStruct((4, 1, 32), jnp.float32), jax.ShapeDtypeStruct((4, 1), jnp.int32)
    cache = jax.eval_shape(lambda: backbone.empty_cache(4, 2048))

    def step(params: Any, cache: Any, x: jax.Array, ones: jax.Array) -> Any:
        return nnx.merge(graph, params)(x, ones, ones, cache)

    memory = jax.jit(step, donate_argnums=1).lower(state, cache, x, ones).compile().memory_analysis()
    held = sum(kept.size * 4 for kept in cache.kept.values())
    assert memory.alias_size_in_bytes >= held and memory.temp_size_in_bytes < held / 2


def on_mesh(model: PrefixModel, mesh: Mesh) -> tuple[nnx.GraphDef, Any]:
    graph, state = nnx.split(model)
    return graph, jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.device_put(leaf, param_sharding(mesh, path_name(path), leaf.shape)),
        nnx.to_pure_dict(state),
    )


@pytest.mark.parametrize(
    "axes", [{"data": 4}, {"fsdp": 4}, {"data": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2}], ids=str
)
def test_replies_are_those_of_one_device_on_every_mesh(tiny_backbone: Path, axes: dict[str, int]):
    """Three rows, which four devices do not divide."""
    model, mesh = load_model(tiny_backbone), mesh_of(**axes)
    prompts = [prompt([1, 40, 50], 0), prompt([1, 70], 1), prompt([1, 9, 8, 7], 0)]
    vectors = np.random.default_rng(1).normal(size=(3, WIDTH)).astype(np.float32)
    graph, params = on_mesh(model, mesh)
    with jax.set_mesh(mesh):
        replies, _ = generate_tokens(
            graph, params, prompts, vectors, sampling=Sampling(max_new_tokens=9), stops=(), pad=0, num_tokens=1
        )
    assert replies == run(model, prompts, vectors, sampling=Sampling(max_new_tokens=9))


def test_a_decoding_step_sends_sums_and_no_weights():
    """And each device holds the keys and values of its own rows and heads."""
    model, mesh, rows = prefix_model(), mesh_of(fsdp=2, tensor=2), 4
    graph, params = on_mesh(model, mesh)
    tokens, users = np.ones((rows, 8), np.int32), np.zeros((rows, 1, USER_WIDTH), np.float32)
    draws, static = Draws.of(Sampling()), {"graph": graph, "top_k": 0, "stops": (), "pad": 0}
    with jax.set_mesh(mesh):
        state = _start_once(params, tokens, tokens, tokens - 2, users, draws, new_tokens=4, **static)
        compiled = _advance_once.lower(params, state, draws, **static).compile()
    shard = state.cache.kept["k"].addressable_shards[0].data.shape
    assert shard == (SIZES["num_hidden_layers"], rows // 2, 12, SIZES["num_key_value_heads"] // 2, SIZES["head_dim"])
    sent = [array for collective in Program(compiled.as_text()).collectives for array in collective.arrays]
    assert sent and max(array.nbytes for array in sent) <= 4 * rows * SIZES["vocab_size"]
    weights = {
        shard.data.shape[-2:] for leaf in jax.tree.leaves(params["backbone"]) for shard in leaf.addressable_shards
    }
    wholes = {leaf.shape[-2:] for leaf in jax.tree.leaves(params["backbone"])}
    assert not {array.shape for array in sent} & (weights | wholes)


def test_sampling_follows_the_softmax():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    many = jnp.tile(logits, (20_000, 1))
    counts = np.bincount(drawn(many, temperature=1.0), minlength=4)
    np.testing.assert_allclose(counts / counts.sum(), [0.5, 0.3, 0.15, 0.05], atol=0.015)
    counts = np.bincount(drawn(many, temperature=1.0, top_k=2), minlength=4)
    np.testing.assert_allclose(counts / counts.sum(), [0.625, 0.375, 0, 0], atol=0.015)
    counts = np.bincount(drawn(many, temperature=1.0, top_p=0.85), minlength=4)
    np.testing.assert_allclose(counts / counts.sum(), np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.015)
    assert set(drawn(many, temperature=0.01).tolist()) == set(drawn(many).tolist()) == {0}


def test_sampled_replies_depend_on_the_seed_only(tiny_backbone: Path):
    model = load_model(tiny_backbone)
    vectors = np.zeros((1, WIDTH), np.float32)
    draws = [
        run(model, [prompt([1, 40])], vectors, sampling=Sampling(max_new_tokens=12, temperature=2.0, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_new_tokens": 0}])
def test_meaningless_sampling_is_refused(bad: dict):
    with pytest.raises(UserError, match="--"):
        Sampling(**bad)


def test_a_run_replies_elsewhere_in_batches_of_one_size(learned_run: Path, tmp_path: Path):
    """Trained with a kernel and on devices that are not here; the last batch is filled up, and compiles nothing."""
    elsewhere = tmp_path / "run"
    shutil.copytree(learned_run, elsewhere)
    config = json.loads((elsewhere / "config.json").read_text())
    config["backbone"]["attention"], config["mesh"] = "splash", {"data": 16, "fsdp": 1, "tensor": 1}
    (elsewhere / "config.json").write_text(json.dumps(config))
    there, here = open_run(elsewhere), open_run(learned_run)
    assert there.model.mesh.size == jax.device_count()
    records = [Record(f"user-{n}", (), ({"role": "user", "content": "any " * (n + 1)},)) for n in range(5)]
    vectors = np.stack([synthetic.vector(n) for n in range(5)])
    compiled = _decode._cache_size()
    replies = generate(there, records, vectors, "e2p", Sampling(max_new_tokens=6), batch=2)
    assert _decode._cache_size() == compiled + 1
    assert replies == generate(here, records, vectors, "e2p", Sampling(max_new_tokens=6), batch=16)
    assert len(set(replies)) > 1


def test_few_prompt_lengths_are_compiled() -> None:
    lengths = [padded_length(longest) for longest in range(1, 8193)]
    assert all(longest <= length < 1.5 * longest + SHORTEST_PROMPT for longest, length in enumerate(lengths, 1))
    assert sorted(set(lengths)) == [64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192]


def test_a_soft_token_is_one_more_position() -> None:
    """Not the next padded length, which would cost a prompt of 512 tokens half as much again."""
    plain = Example(np.ones(512, np.int32), np.zeros(512, bool), (), "")
    prefixed = Example(np.ones(514, np.int32), np.zeros(514, bool), (0,), "")
    vectors = np.zeros((1, 3), np.float32)
    assert _left_padded([plain], vectors, 0, 2)[0].shape == (1, 512)
    assert _left_padded([prefixed], vectors, 0, 2)[0].shape == (1, 514)
    assert _left_padded([plain, prefixed], vectors[[0, 0]], 0, 2)[0].shape == (2, 514)


def test_generation_stops_at_whatever_ends_a_reply(learned_run: Path):
    """Not at EOS alone: the encoder knows all of them."""
    opened = open_run(learned_run)
    encoder = opened.inputs.encoder
    record = Record("user-1", (), ({"role": "user", "content": "do you have any pets?"},), source="here")
    vector = opened.inputs.table.lookup(["user-1"], ["here"])
    (reply,) = generate(opened, [record], vector, "e2p", Sampling(max_new_tokens=12))
    stop = encoder.tokenizer(" " + reply, add_special_tokens=False)["input_ids"][2]
    sooner = dataclasses.replace(encoder, stops=(*encoder.stops, stop))
    stopped = dataclasses.replace(opened, inputs=dataclasses.replace(opened.inputs, encoder=sooner))
    (cut,) = generate(stopped, [record], vector, "e2p", Sampling(max_new_tokens=12))
    *_, last = stream(stopped, [record], vector, ["e2p"], Sampling(max_new_tokens=12))
    assert 0 < len(cut) < len(reply) and reply.startswith(cut) and last == [cut]


def test_a_stop_does_not_end_what_a_reply_opens_with():
    """The title goes on where the model would have stopped; behind it a stop is one."""
    done, token = jnp.array([True, True, False]), jnp.array([7, 7, 7], jnp.int32)
    opening = np.array([[3, 4, 5], [3, -1, -1], [-1, -1, -1]], np.int32)
    for step, tokens, ended in ((1, [4, 7, 7], [False, True, False]), (3, [7, 7, 7], [True, True, False])):
        state = Decoding(jnp.int32(step), token, done, token, token, {})
        opened = _opened(state, jnp.asarray(opening))
        assert opened.token.tolist() == tokens and opened.done.tolist() == ended
    assert _opened(state, None) is state


def test_what_stood_in_front_in_training_does_by_default(
    learned_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """One token for all in a run that learned one for all; the printed answers after training go by it, too."""
    shutil.copytree(learned_run, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"condition": "e2p"', '"condition": "mean"'))
    users = [f"user-{user}" for user in range(6)]
    command = ["generate", str(tmp_path / "run"), "--prompt", "do you have any pets?", "--user", *users]
    assert main(command) == 0
    said = [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    assert len(said) == 6 and len(set(said)) == 1
    assert main([*command, "--condition", "text"]) == 1
    assert "condition text puts texts in front, and none are given" in capsys.readouterr().err

    run, screen = open_run(learned_run), rich.console.Console(file=io.StringIO(), width=200)
    config = run.inputs.config.change(data={"condition": "none"})
    show_answers(dataclasses.replace(run, inputs=dataclasses.replace(run.inputs, config=config)), screen)
    assert "without prefix" in screen.file.getvalue() and "user-" not in screen.file.getvalue()
