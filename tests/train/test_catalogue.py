"""Training with a catalogue: what moves, what is kept, and where an item goes that came later."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import safetensors.numpy
from etils import epath
from flax import nnx
from helpers import mesh_of, prefix_model, random_batch

from e2p_jax.cli import main
from e2p_jax.config import BackboneConfig, Config, DataConfig, ItemsConfig, MeshConfig, TrainConfig
from e2p_jax.data.packing import Budget, empty_rows, fill_row
from e2p_jax.datasets import synthetic
from e2p_jax.datasets.interactions.log import Interactions, load_titles, save_interactions
from e2p_jax.datasets.records import read_jsonl
from e2p_jax.errors import UserError
from e2p_jax.evaluate.generate import Draws, _left_padded, _start_once, generate_tokens, reply, stream
from e2p_jax.evaluate.rank import candidate_examples
from e2p_jax.options import Sampling
from e2p_jax.prefix import mlp
from e2p_jax.prefix.items import Items
from e2p_jax.train.loop import read_data, train
from e2p_jax.train.metrics import read_metrics
from e2p_jax.train.optimizer import make_optimizer
from e2p_jax.train.partition import trainable_mask
from e2p_jax.train.run import _in_order, open_run
from e2p_jax.train.score import Scorer, pack_groups
from e2p_jax.train.setup import Model, frozen_model, initial_state, read_inputs
from e2p_jax.train.step import make_train_step
from e2p_jax.vectors.source import Vectors
from e2p_jax.vectors.table import save_table

USERS, ITEMS = range(16), [f"film {n}" for n in range(12)]
GIVEN = np.random.default_rng(0).normal(2.0, 3.0, (len(ITEMS) + 2, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def config(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("items")
    lines = []
    for user in USERS:
        record = synthetic.record(user)
        named = [ITEMS[user % 12], ITEMS[(5 * user + 1) % 12], "not in the table"]
        split = "validation" if user < 4 else "train"
        values = {"user_id": record.user_id, "messages": record.messages, "items": named, "split": split}
        lines.append(json.dumps(values))
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    vectors = np.stack([synthetic.vector(user) for user in USERS])
    save_table(folder / "users", [f"user-{user}" for user in USERS], vectors, name="users", version="1")
    save_table(folder / "users-items", ITEMS, GIVEN[:-2], name="items", version="1")
    return Config(
        backbone=BackboneConfig(path=str(tiny_backbone)),
        data=DataConfig(
            path=str(folder / "records.jsonl"),
            embeddings=str(folder / "users"),
            items="auto",
            dev_split="auto",
            seq_len=128,
        ),
        items=ItemsConfig(width=8, text_weight=0.5, token=True),
        projector=mlp.Settings(hidden_size=16),
        mesh=MeshConfig(data=2, fsdp=2),
        train=TrainConfig(steps=4, rows=4, warmup_steps=1, eval_every=2, checkpoint_every=2, log_every=1),
    ).resolved()


@pytest.fixture(scope="module")
def run(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(train(config, tmp_path_factory.mktemp("trained") / "run"))


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line]


def head(run: Path, **how: str) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in open_run(run, "last", **how).model.params["items"].items()}


def test_the_head_is_learned_and_kept_and_the_backbone_is_not(config: Config, run: Path) -> None:
    held = head(run)
    named = {item for record in read_jsonl(Path(config.data.path), "train") for item in record.items}
    moved = {ITEMS[row] for row in np.flatnonzero(np.abs(held["learned"]).max(axis=1) > 0)}
    assert named - {"not in the table"} <= moved
    standard = (GIVEN[:-2] - GIVEN[:-2].mean(axis=0)) / GIVEN[:-2].std(axis=0)
    np.testing.assert_allclose(held["given"], standard, rtol=1e-4, atol=1e-5)
    state = (run / "checkpoints" / "4" / "state" / "_METADATA").read_text()
    assert "items/learned" in state and "items/given" not in state and "backbone" not in state
    assert (run / "items.txt").read_text() == "\n".join(ITEMS) + "\n"
    stored = safetensors.numpy.load_file(Path(config.backbone.path) / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(open_run(run, "last").model.params["backbone"]["embedding"], stored)


def test_a_mesh_of_one_device_gives_the_same_loss(config: Config, run: Path, tmp_path: Path) -> None:
    alone = train(dataclasses.replace(config, mesh=MeshConfig(data=4)), tmp_path / "run")
    np.testing.assert_allclose(losses(Path(alone)), losses(run), rtol=1e-4)
    np.testing.assert_allclose(head(Path(alone))["learned"], head(run)["learned"], atol=1e-4)


def test_a_resumed_run_is_the_same_bit_for_bit(config: Config, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "4")
    train(config, copy)
    for name, value in head(run).items():
        np.testing.assert_array_equal(head(copy)[name], value)
    other = GIVEN[:-2] + 1
    save_table(tmp_path / "other", ITEMS, other, name="items", version="2")
    shutil.rmtree(copy / "checkpoints" / "4")
    with pytest.raises(UserError, match="its position is one in other items"):
        train(config.change(data={"items": str(tmp_path / "other")}), copy)


def test_a_later_item_has_the_row_that_its_vector_maps_to(run: Path, tmp_path: Path) -> None:
    """The table may give the items in another order; the run's own keep what they learned."""
    order = np.random.default_rng(1).permutation(len(GIVEN))
    names = [*ITEMS, "new 1", "new 2"]
    save_table(tmp_path / "more", [names[n] for n in order], GIVEN[order], name="items", version="2")
    before, after = head(run), head(run, items=str(tmp_path / "more"))
    np.testing.assert_array_equal(after["learned"][:12], before["learned"])
    np.testing.assert_allclose(after["given"][:12], before["given"], atol=1e-5)
    assert not after["learned"][12:].any() and after["said"].shape == after["learned"].shape
    mean, std = GIVEN[:-2].mean(axis=0), GIVEN[:-2].std(axis=0)
    opened = open_run(run, "last", items=str(tmp_path / "more"))
    late = [opened.inputs.catalogue.table.index.ids([row])[0] for row in (12, 13)]
    rows = np.asarray(opened.model.merged.items.rows())[12:]
    expected = (GIVEN[[names.index(name) for name in late]] - mean) / std @ before["map"]
    np.testing.assert_allclose(rows, expected, rtol=1e-3, atol=1e-4)
    save_table(tmp_path / "fewer", names[1:], GIVEN[1:], name="items", version="2")
    with pytest.raises(UserError, match=r"'film 0' of .* has no vector"):
        open_run(run, "last", items=str(tmp_path / "fewer"))


def test_the_query_stands_where_the_reply_begins(config: Config) -> None:
    inputs = read_inputs(config)
    data = read_data(inputs)
    batch = data.train.batch(list(range(len(data.train.rows))))
    for row, numbers in enumerate(data.train.rows):
        for segment, number in enumerate(numbers.tolist()):
            place = batch["item_positions"][row, segment]
            example = data.train.examples[number]
            # Behind it stands the item, one of S behind all users' soft tokens, which predicts a target,
            assert batch["slots"][row, place + 1] == batch["user_embeddings"].shape[1] + segment
            assert (batch["target_positions"][row] == place + 1).sum() == 1
            assert place not in batch["target_positions"][row]
            assert batch["segment_ids"][row, place] == segment + 1
            later = example.is_target[example.answer + 2 :]
            assert later[0] and not example.is_target[: example.answer + 2][-2:].any()  # the first of a reply,
            assert np.diff(np.flatnonzero(later), prepend=-1).max() == 1  # which is the last one
            ids = batch["item_ids"][row, segment]
            assert len(ids[ids >= 0]) == 2 and (ids[ids >= 0] == example.items).all()


def test_items_that_no_training_record_names_are_counted(config: Config, tmp_path: Path) -> None:
    assert not any("items" in warning for warning in read_data(read_inputs(config)).warnings)
    save_table(tmp_path / "more", [*ITEMS, "new 1", "new 2"], GIVEN, name="items", version="2")
    more = config.change(data={"items": str(tmp_path / "more")})
    assert any("2 of 14 items are in no training record" in w for w in read_data(read_inputs(more)).warnings)


def test_an_item_that_is_not_in_the_table_does_not_stand_in_front(config: Config) -> None:
    encoder = read_inputs(config).encoder
    record = next(iter(read_jsonl(Path(config.data.path), "train")))
    first, other = encoder.encode(record, "e2p"), dataclasses.replace(record, items=("nobody's", *record.items))
    assert first.item_slot > 0 and encoder.encode(other, "e2p").item_slot == -1
    np.testing.assert_array_equal(encoder.encode(other, "e2p").items, first.items)
    asked = dataclasses.replace(record, candidates=("a dog.", "a cat."))  # the true item would tell which
    assert {each.item_slot for each in candidate_examples({"e2p": asked}, encoder)["e2p"]} == {-1}


def test_records_without_an_item_of_the_catalogue_are_ranked_too(config: Config, run: Path) -> None:
    opened = open_run(run)
    record = next(iter(read_jsonl(Path(config.data.path), "train")))
    foreign = opened.inputs.encoder.encode(dataclasses.replace(record, items=("nobody's",)), "e2p")
    known = opened.inputs.encoder.encode(record, "e2p")
    found = []
    for examples in ([foreign, foreign], [foreign, known]):
        vectors = Vectors.of(np.stack([synthetic.vector(0)] * 2))
        packed = pack_groups({"e2p": (examples, vectors)}, opened.inputs.encoder)
        found.append(Scorer(opened).item_queries(packed["e2p"])[0])
    np.testing.assert_allclose(*found, rtol=1e-5)
    assert np.abs(found[0]).max() > 0


def test_words_follow_the_item_that_the_head_picks(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What one pass says token by token is what the training's batch says of the same item and tokens."""
    opened = open_run(run, "last")
    encoder, model = opened.inputs.encoder, opened.model
    records = [
        dataclasses.replace(synthetic.record(user), messages=({"role": "user", "content": "hi"},)) for user in USERS
    ]
    prompts = [encoder.encode_prompt(record, "e2p") for record in records]
    vectors = opened.vectors(records, "e2p").gather()
    how = {"sampling": Sampling(max_new_tokens=6), "stops": (), "pad": encoder.pad_id, "num_tokens": 1}

    def as_trained(said: list[list[int]], items: list[int]) -> dict[str, np.ndarray]:
        batch = empty_rows(len(prompts), Budget(128, 6, 1, 1), vectors.shape[1])
        for row, (prompt, new, item) in enumerate(zip(prompts, said, items, strict=True)):
            tokens, place = np.array([*prompt.tokens, encoder.pad_id, *new], np.int32), len(prompt.tokens)
            is_target, ids = np.arange(len(tokens)) > place, np.array([item], np.int32)
            whole = prompt._replace(tokens=tokens, is_target=is_target, items=ids, item_slot=place)
            fill_row(batch, row, [whole], vectors[row : row + 1], 1)
        return batch

    with jax.set_mesh(model.mesh):
        queries = jax.jit(lambda params, batch: nnx.merge(model.graph, params).item_queries(batch))
        states = jax.jit(lambda params, batch: nnx.merge(model.graph, params)._states(batch, None))
        # So short a training leaves all users with one item: less what they have in common they differ.
        common = queries(model.params, as_trained([[0] * 6] * len(prompts), [0] * len(prompts))).mean(axis=(0, 1))
        head = model.params["items"]
        params = {**model.params, "items": {**head, "query_bias": head["query_bias"] - common}}
        said, items = generate_tokens(model.graph, params, prompts, vectors, **how)
        inputs = _left_padded(prompts, vectors, encoder.pad_id, 1), Draws.of(how["sampling"])
        static = {"graph": model.graph, "top_k": 0, "stops": (), "pad": encoder.pad_id}
        begun = _start_once(params, *inputs[0], inputs[1], new_tokens=1, **static)
        batch, merged = as_trained(said, items), nnx.merge(model.graph, params)
        scores = np.asarray(queries(params, batch))[:, 0] @ np.asarray(merged.items.rows()).T
        hidden = np.take_along_axis(np.asarray(states(params, batch)), batch["target_positions"][..., None], axis=1)
        best = np.asarray(merged.backbone.logits(hidden)).argmax(axis=-1)
    assert items == scores.argmax(axis=-1).tolist() and len(set(items)) > 1
    np.testing.assert_array_equal(best, said)
    assert begun.lengths.tolist() == [len(prompt.tokens) + 1 for prompt in prompts]  # where the first word stands
    assert main(["generate", str(run), "--user", "user-5", "--prompt", "hi", "--json", "--checkpoint", "last"]) == 0
    assert json.loads(capsys.readouterr().out)["item"] in ITEMS


def test_words_open_with_the_title_that_the_log_has(run: Path, tmp_path: Path) -> None:
    """Behind it they go on by themselves; an item that the log does not have leaves all words to them."""
    opened = open_run(run, "last")
    titles = [f"The {item}, part {n} <|end|>" for n, item in enumerate(ITEMS)]  # text is text
    nothing = np.zeros(0, np.int32)
    inputs = dataclasses.replace(opened.inputs, config=opened.inputs.config.change(data={"path": str(tmp_path)}))
    logged = dataclasses.replace(opened, inputs=inputs)
    records = [
        dataclasses.replace(synthetic.record(user), messages=({"role": "user", "content": "hi"},)) for user in USERS
    ]
    vectors, how = opened.vectors(records, "e2p").gather(), Sampling(max_new_tokens=40)
    free = reply(opened, records, vectors, "e2p", how)
    for known in (len(ITEMS), 0):
        log = Interactions([], ITEMS[:known], titles[:known], *[nothing] * 2, nothing.astype(np.float32), None, nothing)
        save_interactions(tmp_path, log)
        load_titles.cache_clear()
        said = reply(logged, records, vectors, "e2p", how)
        assert [each.item for each in said] == [each.item for each in free]
        for each, of_its_own in zip(said, free, strict=True):
            if known:
                assert each.text.startswith(titles[ITEMS.index(str(each.item))].lower().replace("<|", "< |"))
            else:
                assert each == of_its_own
        assert list(stream(logged, records, vectors, ["e2p"] * len(records), how))[-1] == [each.text for each in said]


def test_a_log_that_is_gone_is_missed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without its titles the words may name another item than the one that is picked."""
    shutil.copytree(run, tmp_path / "run")
    path, values = tmp_path / "run" / "config.json", json.loads((run / "config.json").read_text())
    for place, is_said in ((values["data"]["path"], False), (str(tmp_path / "moved"), True)):
        values["data"]["path"] = place
        path.write_text(json.dumps(values))
        open_run(tmp_path / "run", "last")
        assert (f"{place}: not there; if it was a log" in capsys.readouterr().err) == is_said


def test_one_export_holds_the_head_and_the_others_say_that_it_is_lost(
    config: Config, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    which = ["export", str(run), "--checkpoint", "last"]
    assert main([*which, "--out", str(tmp_path / "out")]) == 0
    assert "head over items" not in capsys.readouterr().err
    opened, held = open_run(run, "last"), safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(held["item_head.rows"], opened.model.merged.items.rows())
    np.testing.assert_array_equal(held["item_head.said"], opened.model.params["items"]["said"])
    assert json.loads((tmp_path / "out" / "items.json").read_text()) == {"ids": ITEMS, "openings": []}
    user, prompt = ["--user", "user-5"], ["--prompt", "hi"]
    others = {"vllm": prompt, "sglang": prompt, "peft": ["--out", str(tmp_path / "adapters")]}
    for name, flags in others.items():
        assert main([*which, "--format", name, *user, *flags]) == 0
        said = capsys.readouterr().err
        assert said.count("lacks the head over items and the item that stands in front of replies; `e2p export") == 1
    frozen = config.change(train={"trainable": ("projector/**", "items/learned")})
    query = frozen_model(read_inputs(frozen), synthetic.vector(0).size, "none").params["items"]["query"]
    assert isinstance(query, jax.Array)  # in no checkpoint, and an export needs it


def test_ids_are_lines_of_text_or_refused(config: Config, tmp_path: Path) -> None:
    def catalogue(*ids: str) -> list[str]:
        np.savez(tmp_path / "items.npz", ids=np.array(ids), embeddings=np.ones((len(ids), 4), np.float32))
        inputs = read_inputs(config.change(data={"items": str(tmp_path / "items.npz")}))
        (tmp_path / "items.txt").write_bytes(inputs.catalogue.table.index.text.tobytes())  # as a run has them
        return list(_in_order(epath.Path(tmp_path), inputs).catalogue.table.ids)

    assert catalogue("a\rb", "\u2028", "c\r") == ["a\rb", "\u2028", "c\r"]
    with pytest.raises(UserError, match="line break; rename that item"):
        catalogue("a\nb", "c")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_is_the_mean_of_items_and_the_weighed_mean_of_text(accumulation: int) -> None:
    """Over all conversations of the batch that name items, in whatever micro-batch they are."""
    whole = prefix_model(num_hidden_layers=1)
    settings = ItemsConfig(width=8, text_weight=0.5)
    whole.items = Items(settings, items=12, given_width=4, model_width=32, rngs=nnx.Rngs(0))
    batch = random_batch()
    ids = np.full((4, 3, 2), -1, np.int32)
    ids[0, 0], ids[1, 1], ids[2, 0, 0] = [1, 2], [3, 4], 7
    batch |= {"item_ids": ids, "item_positions": np.array([[3, 15, 0]] * 4, np.int32)}
    graph, state = nnx.split(whole)
    mask = trainable_mask(whole, ("projector/**", "items/**"))
    config = TrainConfig(warmup_steps=0, steps=10)
    model = Model(mesh_of(), graph, nnx.to_pure_dict(state), mask, "random")
    trained, frozen = initial_state(model, config)
    optimizer = make_optimizer(config, mask, model.params)
    step = make_train_step(graph, mask, optimizer, optax.constant_schedule(1e-2), accumulation)
    _, metrics = jax.jit(step)(trained, frozen, batch)
    text, items = (np.asarray(f(batch)) for f in (jax.jit(whole.target_nll), jax.jit(whole.item_nll)))
    assert (items > 0).sum() == 3
    expected = items.sum() / 3 + 0.5 * text.sum() / batch["target_weights"].sum()
    assert float(metrics.loss) == pytest.approx(expected, rel=1e-5)
