"""The head over a catalogue in torch, against e2p_jax itself."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_calls
import torch
import transformers
from flax import nnx
from helpers import assert_close, untrained_run
from test_calls import ANSWER
from test_export_families import USERS, asked, load

from e2p_jax.data.encode import Encoder
from e2p_jax.datasets.interactions.log import Interactions, load_titles, save_interactions
from e2p_jax.errors import UserError
from e2p_jax.evaluate.generate import Sampling, _left_padded, reply, vectors_for
from e2p_jax.export.import_back import import_transformers
from e2p_jax.export.transformers import export_transformers
from e2p_jax.train.run import Run, open_run

IDS = ["film 1", " film 1", "a\rb", "a\u2028b", '"', "\\n", "\u00e9t\u00e9", "\U0001f600", "null", "9", "9.0", "{}"]


class Exported(test_calls.Exported):
    def prompts(self, side: str = "left") -> dict[str, Any]:
        """With their users' vectors."""
        return {**super().prompts(side), "user_embedding": self.vectors}


@pytest.fixture(scope="module")
def exported(lively_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("items")
    given = np.random.default_rng(0).normal(2.0, 3.0, (len(IDS), 4)).astype(np.float32)
    np.savez(folder / "items.npz", ids=np.array(IDS), embeddings=given)
    run = untrained_run(folder, lively_backbone, "after_bos", 2, "mlp", str(folder / "items.npz"))
    export_transformers(run, folder / "out", include_backbone=False)
    return Exported(run, folder / "out", *load(folder / "out"), torch.tensor(vectors_for(run, USERS, USERS, "e2p")))


def our_scores(run: Run, vectors: np.ndarray) -> np.ndarray:
    """[3, I], by what `generate` picks an item."""
    encoder = run.inputs.encoder
    prompts = [encoder.encode_prompt(record, "e2p") for record in asked()]

    @jax.jit
    def scores(params: Any, tokens: jax.Array, segments: jax.Array, slots: jax.Array, users: jax.Array) -> jax.Array:
        model = nnx.merge(run.model.graph, params)
        positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
        return model.item_logits(model.hidden(model.embed(tokens, slots, users), positions, segments)[0][:, -1:])[:, 0]

    with jax.set_mesh(run.model.mesh):
        return np.asarray(scores(run.model.params, *_left_padded(prompts, vectors, encoder.pad_id, 2)))[:3]


def test_items_are_ranked_as_the_run_ranks_them(exported: Exported):
    ours = our_scores(exported.run, exported.vectors.numpy())
    order = np.argsort(-ours, axis=1)
    assert len({row[0] for row in order.tolist()}) > 1, "the users have one best item, so little is tested"
    best = [[IDS[item] for item in row] for row in order]
    for side in ("left", "right"):
        ids, scores = exported.model.rank_items(**exported.prompts(side), top_k=5)
        assert ids == [row[:5] for row in best]
        assert_close(scores.numpy(), np.take_along_axis(ours, order[:, :5], axis=1))
        assert exported.model.rank_items(**exported.prompts(side), top_k=None)[0] == best


def test_words_follow_the_item_that_is_picked(exported: Exported):
    """With the prompts' cache, without one, by beams of one, and where the item is asked for by its id."""
    model, inputs = exported.model, exported.prompts()
    ours = reply(exported.run, asked(), exported.vectors.numpy(), "e2p", Sampling(max_new_tokens=6))
    start = inputs["input_ids"].shape[1]

    def said(**options: Any) -> tuple[list[str], list[str]]:
        out = model.generate(**inputs, return_dict_in_generate=True, **ANSWER | options)
        asked_of = inputs["input_ids"].repeat_interleave(len(out.item_ids) // 3, dim=0)
        assert torch.equal(out.sequences[:, :start], asked_of)
        texts = exported.tokenizer.batch_decode(out.sequences[:, start:], skip_special_tokens=True)
        return [text.strip() for text in texts], out.item_ids

    read: list[int] = []  # positions of each pass
    hook = model.backbone.base_model.register_forward_hook(lambda *a: read.append(a[2].last_hidden_state.shape[1]))
    texts, items = said()
    hook.remove()
    assert read == [start + 2] + [1] * (len(read) - 1)  # the prompt once, the item behind it
    assert [(each.text, each.item) for each in ours] == list(zip(texts, items, strict=True)) and len(set(items)) > 1
    assert said(use_cache=False) == said(item_ids=items) == said(do_sample=True, top_k=1) == (texts, items)
    others = [ranked[1] for ranked in model.rank_items(**inputs)[0]]
    assert said(item_ids=others)[0] != texts and said(item_ids=others)[1] == others
    twice = said(num_beams=2, num_return_sequences=2)
    assert twice[1] == [item for item in items for _ in range(2)]
    torch.manual_seed(0)
    assert len({item for _ in range(6) for item in said(do_sample=True, temperature=9.0, max_new_tokens=1)[1]}) > 3
    plain = model.generate(**inputs, **ANSWER)
    assert exported.tokenizer.batch_decode(plain[:, start:], skip_special_tokens=True)[0].strip() == texts[0]
    right = model.generate(**exported.prompts("right"), **ANSWER)
    assert torch.equal(right[:, start:], plain[:, start:])
    short = model.generate(**inputs, max_length=start + 3, do_sample=False)
    assert torch.equal(short, plain[:, : start + 3])  # no item is counted


def test_words_open_with_the_titles_of_a_log(exported: Exported, tmp_path: Path):
    """One item has none there."""
    named, nothing = [item for item in IDS if item != "9"], np.zeros(0, np.int32)
    titles = [f"film {n}: part {n * n} <b>" for n in range(len(named))]
    log = Interactions([], named, titles, nothing, nothing, nothing.astype(np.float32), None, nothing)
    (tmp_path / "log").mkdir()
    save_interactions(tmp_path / "log", log)
    config = exported.run.inputs.config.change(data={"path": str(tmp_path / "log")})
    run = dataclasses.replace(exported.run, inputs=dataclasses.replace(exported.run.inputs, config=config))
    export_transformers(run, tmp_path / "out", include_backbone=False)
    (model, tokenizer), inputs = load(tmp_path / "out"), exported.prompts()
    ours = reply(run, asked(), exported.vectors.numpy(), "e2p", Sampling(max_new_tokens=40))
    for each in ours:
        assert each.text.startswith(titles[named.index(str(each.item))])
    start, long = inputs["input_ids"].shape[1], ANSWER | {"max_new_tokens": 40}

    def said(**options: Any) -> list[str]:
        out = model.generate(**inputs, **long | options)
        return [text.strip() for text in tokenizer.batch_decode(out[:, start:], skip_special_tokens=True)]

    assert said() == [each.text for each in ours]
    for text, each in zip(said(num_beams=2, num_return_sequences=2)[::2], ours, strict=True):
        assert text.startswith(titles[named.index(str(each.item))])
    for text, each in zip(said(no_repeat_ngram_size=1), ours, strict=True):  # nor does another processor hinder it
        assert text.startswith(titles[named.index(str(each.item))])
    assert len(said(num_beams=2, do_sample=True)) == 3
    assert not said(item_ids=["9"] * 3)[0].startswith("film")
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "items.json").read_text())["openings"][IDS.index("9")] == []
    titles[0] = "<s>"
    save_interactions(tmp_path / "log", log)
    load_titles.cache_clear()
    encoder = Encoder.from_config(config.change(data={"control_text": "refuse"}), run.inputs.encoder.tokenizer)
    refusing = dataclasses.replace(run.inputs, encoder=encoder)
    with pytest.raises(UserError, match=r"^title of item 'film 1': .* control token"):
        export_transformers(dataclasses.replace(run, inputs=refusing), tmp_path / "refused", False)
    load_titles.cache_clear()


def test_what_knows_no_place_for_an_item_is_refused(exported: Exported, lively_backbone: Path, tmp_path: Path):
    first = exported.model.generate(**exported.prompts(), return_dict_in_generate=True, **ANSWER)
    with pytest.raises(ValueError, match="leave the cache out"):
        exported.model.generate(**exported.prompts(), cache=first.cache, **ANSWER)
    for wrong in (IDS[:2], ["nobody's", *IDS[:2]]):
        with pytest.raises(ValueError, match=r"item_ids: needs 3 ids of items\.json"):
            exported.model.generate(**exported.prompts(), item_ids=wrong)
    export_transformers(untrained_run(tmp_path, lively_backbone, "after_bos", 2, "mlp"), tmp_path / "out", False)
    without, _ = load(tmp_path / "out")
    with pytest.raises(ValueError, match=r"no catalogue: .* had no data\.items"):
        without.rank_items(**exported.prompts())
    with pytest.raises(ValueError, match="leave item_ids out"):
        without.generate(**exported.prompts(), item_ids=IDS[:3])


def test_what_goes_to_a_hub_knows_its_items(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Both ways of transformers, up to the requests themselves."""
    model, _ = load(exported.directory)
    sent: list[set[str]] = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda _, name, **__: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_commit",
        lambda _, operations, **__: sent.append({added.path_in_repo for added in operations}),
    )
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="someone/model")
    model.push_to_hub("someone/model")
    for files in sent:
        assert {"config.json", "model.safetensors", "modeling_e2p.py", "items.json"} <= files
    assert len(sent) == 2


def test_saved_again_it_knows_its_items(exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """In the LM's other dtype, too; as a run again it has the soft tokens alone, and says so."""
    model, _ = load(exported.directory)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    exported.tokenizer.save_pretrained(tmp_path / "saved")
    options: dict[str, Any] = {"trust_remote_code": True, "dtype": torch.bfloat16}
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", **options)
    assert again.item_ids == IDS and again.rank_items(**exported.prompts())[1].dtype == torch.float32
    assert again.generate(**exported.prompts(), max_new_tokens=1).shape[0] == 3
    for name, value in exported.model.item_head.state_dict().items():
        assert torch.equal(again.item_head.state_dict()[name], value) and value.dtype == torch.float32, name
    export_transformers(exported.run, tmp_path / "whole", include_backbone=True)
    whole, _ = load(tmp_path / "whole")
    assert whole.rank_items(**exported.prompts())[0] == exported.model.rank_items(**exported.prompts())[0]
    capsys.readouterr()
    import_transformers(tmp_path / "whole", tmp_path / "run")
    assert "the head over items is not imported" in capsys.readouterr().err
    assert "items" not in open_run(tmp_path / "run").model.params


def test_the_card_shows_how(exported: Exported, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(exported.directory)
    card = Path("README.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", card, re.DOTALL))
    exec(code.replace("max_new_tokens=32", "max_new_tokens=1"), names := {})
    assert len(names["ids"][1]) == names["scores"].shape[1] == 10 and capsys.readouterr().out
    assert f"catalogue of {len(IDS)} items" in card and "output's `item_ids`" in card
