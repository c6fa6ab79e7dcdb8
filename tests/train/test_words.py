"""Beginning with words: the first soft tokens are the ridge regression that the module writes down, worked out anew."""

import collections
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from e2p_jax.config import BackboneConfig, Config, DataConfig, ProjectorConfig
from e2p_jax.datasets import synthetic
from e2p_jax.errors import UserError
from e2p_jax.prefix import blocks, linear, mlp
from e2p_jax.train import words
from e2p_jax.train.setup import Inputs, Model, build_model, read_inputs
from e2p_jax.vectors.population import Population
from e2p_jax.vectors.table import save_table

USERS = [f"user-{user}" for user in range(40)]
WIDTH = 6


def texts_of(user: int) -> list[str]:
    """Of one to four sentences; the last users have none."""
    persona = [text for text in synthetic.record(user).context if text.strip()]
    return persona[: 1 + user % 4] if user < 36 else []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("words")
    said = {"prompt": "hi", "response": "yes."}
    lines = [{"user_id": name, "context": texts_of(user), **said} for user, name in enumerate(USERS)]
    for later in ({"user_id": USERS[0], "context": ["a later record"]}, {"user_id": "other", "context": ["x"]}):
        lines.append(later | said)
    (place / "records.jsonl").write_text("".join(json.dumps({**line, "split": "train"}) + "\n" for line in lines))
    (place / "silent.jsonl").write_text(json.dumps({"user_id": USERS[0], **said, "split": "train"}) + "\n")
    vectors = 3 + np.random.default_rng(0).normal(size=(len(USERS), WIDTH)) * np.arange(1, WIDTH + 1)
    save_table(place / "table", USERS, vectors.astype(np.float32), name="t", version="1")
    return place


def opened(folder: Path, backbone: Path, projector: ProjectorConfig, name: str = "records") -> tuple[Inputs, Model]:
    data = DataConfig(path=str(folder / f"{name}.jsonl"), embeddings=str(folder / "table"), seq_len=128)
    inputs = read_inputs(Config(backbone=BackboneConfig(path=str(backbone)), data=data, projector=projector))
    assert inputs.table is not None
    return inputs, build_model(inputs, Population.of(inputs.table.gather(np.arange(36))))


def bags(inputs: Inputs, embedding: np.ndarray, unit: float, count: int) -> np.ndarray:
    """[users, K, D], word by word."""
    every = {text for user in range(36) for text in texts_of(user)}
    ids = {text: inputs.encoder.tokenizer(f" {text}", add_special_tokens=False)["input_ids"] for text in every}
    holds = collections.Counter(token for held in ids.values() for token in set(held))
    out = np.zeros((36, count, embedding.shape[1]))
    for user in range(36):
        for part in range(count):
            texts = texts_of(user)
            for number, text in enumerate(texts):
                if number % count == part % len(texts) % count:
                    for token in ids[text]:
                        out[user, part] += np.log((1 + len(every)) / holds[token]) ** 2 * embedding[token]
    return out * (unit / np.sqrt(np.mean(out**2, axis=-1, keepdims=True)))


@pytest.mark.parametrize("settings", [mlp.Settings, linear.Settings, blocks.Settings], ids=lambda kind: kind().kind)
def test_the_first_tokens_are_the_regression(
    folder: Path, tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch, settings: type[mlp.Settings]
) -> None:
    """By least squares over rows of the ridge's own below those of the users; also where users come in parts."""
    count = 3 if settings is blocks.Settings else 2
    inputs, model = opened(folder, tiny_backbone, settings(num_tokens=count, init_scale=0.5, max_scale=0.0))
    assert inputs.table is not None
    vectors = inputs.table.gather(np.arange(36))
    embedding = np.asarray(model.params["backbone"]["embedding"], np.float64)
    monkeypatch.setattr(words, "_BYTES", 4096)
    begun = words.begin_with_words(model, inputs, USERS)

    x = (vectors.astype(np.float64) - vectors.mean(0)) / vectors.std(0)
    y = bags(inputs, embedding, 0.5 * np.sqrt(np.mean(embedding**2)), count)
    shape = y.shape
    if settings is blocks.Settings:
        x, y = x.reshape(-1, WIDTH // count), y.reshape(-1, shape[-1])
    else:
        y = y.reshape(36, -1)
    centered = x - x.mean(0), y - y.mean(0)
    below = np.sqrt(3 * x.shape[1]) * np.eye(x.shape[1])
    weight = np.linalg.lstsq(
        np.concatenate([centered[0], below]), np.concatenate([centered[1], np.zeros((len(below), y.shape[1]))])
    )[0]
    guess = centered[0] @ weight
    expected = y.mean(0) + guess * np.sqrt(np.sum(centered[1] ** 2) / np.sum(guess**2))
    np.testing.assert_allclose(begun.merged.projector(vectors), expected.reshape(shape), rtol=1e-3, atol=1e-5)
    fresh = np.asarray(model.merged.projector(vectors))
    assert np.abs(fresh - expected.reshape(shape)).max() > 0.1 * np.abs(expected).max()


def test_what_cannot_begin_with_words_is_refused(
    folder: Path, tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, model = opened(folder, tiny_backbone, linear.Settings(), "silent")
    with pytest.raises(UserError, match=r"silent.jsonl: no record of a training user .* has a context.*start=random"):
        words.begin_with_words(model, inputs, USERS)
    config = Config(projector=linear.Settings(start="words"))
    config.validate()
    monkeypatch.delattr(linear, "begin")
    with pytest.raises(UserError, match=r"projector.kind linear cannot begin as a linear map .*start=random"):
        config.validate()
    dataclasses.replace(config, projector=linear.Settings()).validate()
