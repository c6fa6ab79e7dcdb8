"""Adapters that stock PEFT loads, against the prefix inside e2p_jax."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers
from flax import nnx
from helpers import assert_close

from e2p_jax.datasets.prepared import load_table
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError
from e2p_jax.evaluate.generate import Sampling, generate, vectors_for
from e2p_jax.export.peft import adapter_directory, export_peft
from e2p_jax.train.run import Run
from e2p_jax.train.setup import read_inputs
from e2p_jax.vectors.table import save_table

# PEFT itself asks transformers for a property that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

USERS = ["user-3", "user-7"]
TOKENS = np.array([[1, 40, 50, 60, 70, 80]], np.int32)


WAYS = [("before_bos", 1, "mlp"), ("after_bos", 3, "linear")]


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_logits_and_answers_are_the_same(make_run: Callable, tmp_path: Path, way: tuple):
    """Of several users, loaded into one model and switched to and fro; what PEFT has no word for it refuses.

    With `after_bos` an adapter has the first token, too, and the prompt is given without it.
    """
    run = make_run(*way)
    export_peft(run, tmp_path / "out", USERS)
    encoder, count = run.inputs.encoder, way[1]
    asked = [Record(user, (), ({"role": "user", "content": "do you have any pets?"},), source=user) for user in USERS]
    vectors = vectors_for(run, USERS, USERS, "e2p")
    answers = generate(run, asked, vectors, "e2p", Sampling(max_new_tokens=8))
    assert answers[0] != answers[1], "the prefix makes no difference here, so nothing is tested"
    base = transformers.AutoModelForCausalLM.from_pretrained(run.inputs.directory, dtype=torch.float32)
    adapted: Any = peft.PeftModel.from_pretrained(base, tmp_path / "out" / USERS[0], adapter_name=USERS[0])
    adapted.load_adapter(tmp_path / "out" / USERS[1], adapter_name=USERS[1])
    for user in (0, 1, 0):
        record, vector, answer = asked[user], vectors[user], answers[user]
        example = encoder.encode_prompt(record, "e2p")
        tokens = jnp.asarray(example.tokens)[None]
        slots = np.full(tokens.shape, -1)
        slots[0, example.slot_places(count)] = np.arange(count)
        model, places = run.model.merged, jnp.arange(tokens.shape[1])[None]
        x = model.embed(tokens, jnp.asarray(slots), jnp.asarray(vector)[None, None])
        hidden, _ = model.backbone(x, places, jnp.ones_like(tokens))
        inputs: Any = encoder.tokenizer.apply_chat_template(
            list(record.messages),
            chat_template=encoder.template,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        if way[0] == "after_bos":
            inputs = {name: value[:, 1:] for name, value in inputs.items()}  # as the card says
            assert "inputs = {name: value[:, 1:] for name," in (tmp_path / "out" / USERS[0] / "README.md").read_text()
        adapted.set_adapter(record.user_id)
        with torch.no_grad():
            assert_close(model.backbone.logits(hidden), adapted(**inputs).logits.numpy())
        new = adapted.generate(**inputs, use_cache=False, max_new_tokens=8, do_sample=False)
        said = encoder.tokenizer.decode(new[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert said.strip() == answer
    with pytest.raises(AttributeError):  # mend CAVEAT and docs/export.md where it can be merged
        adapted.merge_and_unload()
    with pytest.raises(ValueError, match="adapter_names"):
        adapted.generate(**inputs, adapter_names=USERS[:1])


def test_templates_that_begin_in_more_than_one_way_are_refused(make_run: Callable, tmp_path: Path):
    """An adapter brings the first token of the prompt, whatever the prompt."""
    run, template = make_run(), tmp_path / "bare.jinja"
    template.write_text("{{- messages[0]['role'] -}}" + run.inputs.encoder.structure.template)
    config = run.inputs.config.change(data={"chat_template": str(template)})
    run = dataclasses.replace(run, inputs=read_inputs(config))
    with pytest.raises(UserError, match=r"begins conversations in more than one way; .* prefix\.placement=before_bos"):
        export_peft(run, tmp_path / "out", USERS)


def test_what_peft_cannot_say_is_refused(make_run: Callable, tmp_path: Path):
    for place, count in (("before_reply", 2), ("in_chat", 1)):
        with pytest.raises(UserError, match=f"the beginning of a prompt, this run's soft tokens stand {place}; export"):
            export_peft(make_run(place, count, "mlp"), tmp_path / "out", USERS)
    with pytest.raises(UserError, match="name them with --user"):
        export_peft(make_run(), tmp_path / "out", [])
    with pytest.raises(UserError, match="nobody"):
        export_peft(make_run(), tmp_path / "out", ["nobody"])
    assert not (tmp_path / "out").exists()


PLAIN = ["u1", "user-3", "_x", "0"]
ODD = ["..", ".", "", "/etc/passwd", "a/b", "-rf", "con", "COM1", "nul.txt", "u" * 300, "x\0y", "u1.", "\ud800", "a\nb"]
ODD += ["Alice", "alice ", "ALICE", "é", "e\u0301", "users.json", "@@x", adapter_directory("Alice")]


def test_every_user_has_a_directory_of_their_own_on_any_file_system():
    names = [adapter_directory(user) for user in PLAIN + ODD]
    assert names[: len(PLAIN)] == PLAIN
    assert len({name.casefold() for name in names}) == len(names) == len(set(PLAIN + ODD))
    for name in names:
        assert name.isascii() and name == name.lower() and len(name) < 80 and set(name) <= set(LEGAL)
        assert name[0] not in ".-" and name[-1] != "." and name.split(".")[0] not in ("con", "nul", "com1")


LEGAL = "abcdefghijklmnopqrstuvwxyz0123456789_-."


def with_users(run: Run, ids: list[str], folder: Path) -> Run:
    """The run with a table of other users."""
    vectors = np.random.default_rng(0).normal(size=(len(ids), run.inputs.table.width)).astype(np.float32)
    save_table(folder / "table", ids, vectors, name="odd", version="1")
    return dataclasses.replace(run, inputs=dataclasses.replace(run.inputs, table=load_table(str(folder / "table"))))


def test_ids_of_all_kinds_stay_inside_the_directory(make_run: Callable, tmp_path: Path):
    ids = ["u1", "Alice", "alice", "..", "a/b", "-rf", "con", "u" * 300]
    run = with_users(make_run(), ids, tmp_path)
    np.save(tmp_path / "v.npy", np.zeros(run.inputs.table.width, np.float32))
    out = tmp_path / "deep" / "out"
    export_peft(run, out, [*ids, "u1", f"@{tmp_path / 'v.npy'}"])
    listed = json.loads((out / "users.json").read_text())
    assert [each["user"] for each in listed] == [*ids, "@v.npy"]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [each["directory"] for each in listed] + ["users.json"]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "table", "v.npy"]
    (wanted,) = vectors_for(run, ["Alice"], [""], "e2p")
    held = safetensors.numpy.load_file(out / listed[1]["directory"] / "adapter_model.safetensors")
    model = nnx.merge(run.model.graph, run.model.params)
    np.testing.assert_allclose(held["prompt_embeddings"][1:], model.projector(wanted), rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="out: holds other files"):  # other users' adapters
        export_peft(run, out, ["u1"])


def test_nobody_s_notes_are_lost(make_run: Callable, tmp_path: Path):
    export_peft(make_run(), tmp_path / "out", USERS)
    (tmp_path / "out" / "user-3" / "notes.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other files than an earlier export; choose another directory"):
        export_peft(make_run(), tmp_path / "out", USERS)
    assert (tmp_path / "out" / "user-3" / "notes.txt").read_text() == "years of work"


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_the_call_that_the_card_names_is_the_right_one(make_run: Callable, lively_backbone: Path, tmp_path: Path):
    """Greedy answers are those of PEFT's own forward, token by token."""
    export_peft(make_run("after_bos", 3, "linear"), tmp_path / "out", USERS[:1])
    base = transformers.AutoModelForCausalLM.from_pretrained(lively_backbone, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out" / USERS[0])
    ids = torch.tensor(TOKENS.tolist())
    wanted = ids
    with torch.no_grad():
        for _ in range(6):
            wanted = torch.cat([wanted, model(input_ids=wanted).logits[:, -1:].argmax(dim=-1)], dim=1)
    card = (tmp_path / "out" / USERS[0] / "README.md").read_text()
    assert "model.generate(**inputs, use_cache=False" in card
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(input_ids=ids, use_cache=False, **settings), wanted)
    if transformers.__version__.startswith("5.24.") and peft.__version__.startswith("0.21."):
        assert not torch.equal(model.generate(input_ids=ids, **settings), wanted), "mend CAVEAT and docs/export.md"
        padded = {**settings, "attention_mask": torch.nn.functional.pad(settings["attention_mask"], (3, 0))}
        left = model.generate(input_ids=torch.nn.functional.pad(ids, (3, 0)), use_cache=False, **padded)[:, 3:]
        assert not torch.equal(left, wanted), "mend CAVEAT and docs/export.md"
