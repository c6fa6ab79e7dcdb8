"""Exported models whose input embeddings are more than a table: Gemma's are scaled, GPT-2's have positions added."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from helpers import hf_config, hf_model

from e2p_jax.backbone import weights
from e2p_jax.config import BackboneConfig, Config, DataConfig, EvaluateConfig, ProjectorConfig, TrainConfig
from e2p_jax.data import synthetic
from e2p_jax.data.embeddings import save_table
from e2p_jax.data.prepared import load_records
from e2p_jax.data.records import write_jsonl
from e2p_jax.evaluate.generate import vectors_for
from e2p_jax.evaluate.table import evaluate
from e2p_jax.export.import_back import import_transformers
from e2p_jax.export.transformers import export_transformers
from e2p_jax.train.loop import train
from e2p_jax.train.run import Run, open_run


@pytest.fixture(params=["gemma2", "gpt2"], scope="module")
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of three steps in front of a random model of the family with the embedded backbone's tokenizer."""
    tmp_path = tmp_path_factory.mktemp(request.param)
    backbone = tmp_path / "backbone"
    sizes = {"vocab_size": 4096, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 0}
    hf_model(hf_config(request.param, **sizes)).save_pretrained(backbone)
    for name in weights.COMPANIONS:
        if name not in ("config.json", "generation_config.json") and (weights.EMBEDDED / name).is_file():
            shutil.copyfile(weights.EMBEDDED / name, backbone / name)
    if request.param == "gpt2":  # as OpenAI's was published
        path = backbone / "model.safetensors"
        tensors = {k.removeprefix("transformer."): v for k, v in safetensors.numpy.load_file(path).items()}
        safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    users = range(12)
    write_jsonl([synthetic.record(user) for user in users], tmp_path / "records.jsonl")
    vectors = np.stack([synthetic.vector(user) for user in users])
    save_table(tmp_path / "table", [f"user-{user}" for user in users], vectors, name="synthetic", version="1")
    config = Config(
        backbone=BackboneConfig(path=str(backbone)),
        data=DataConfig(path=str(tmp_path / "records.jsonl"), embeddings=str(tmp_path / "table"), seq_len=256),
        projector=ProjectorConfig(hidden_size=16),
        train=TrainConfig(steps=3, rows=4, warmup_steps=1, learning_rate=0.01),
        evaluate=EvaluateConfig(conditions=("none", "e2p")),
    )
    return open_run(train(config, tmp_path / "run"), "last")


@pytest.mark.parametrize("include_backbone", [True, False])
def test_nll_is_the_same(run: Run, tmp_path: Path, include_backbone: bool) -> None:
    records = load_records(run.inputs.config.data.path, "all")[:4]
    ours = evaluate(run, records, "all", ["e2p"]).scores["e2p"]
    export_transformers(run, tmp_path / "out", include_backbone)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    for record, nll in zip(records, ours.nll, strict=True):
        encoded = tokenizer.apply_chat_template(
            list(record.messages), return_dict=True, return_assistant_tokens_mask=True
        )
        ids = torch.tensor([encoded["input_ids"]])
        labels = ids.masked_fill(~torch.tensor([encoded["assistant_masks"]], dtype=torch.bool), -100)
        vector = torch.tensor(vectors_for(run, [record.user_id], [record.user_id], "e2p"))
        with torch.no_grad():
            loss = model(ids, user_embedding=vector, labels=labels).loss
        assert float(loss) * int((labels >= 0).sum()) == pytest.approx(nll, rel=1e-4)
    if run.inputs.decoder.embedding_scale > 1:  # as in versions of transformers that scale `inputs_embeds`
        model.backbone.set_input_embeddings(torch.nn.Embedding(4096, 32))
        with pytest.raises(ValueError, match="upgrade transformers"):
            type(model)(model.config, model.backbone)


def test_imported_back_it_is_the_same(run: Run, tmp_path: Path) -> None:
    """The backbone's tensors get the names back that they had, so its fingerprint is the same."""
    export_transformers(run, tmp_path / "out", include_backbone=True)
    import_transformers(tmp_path / "out", tmp_path / "run")
    again = open_run(tmp_path / "run")
    assert again.model.fingerprint == run.model.fingerprint
    assert np.array_equal(again.model.params["projector"]["skip"], run.model.params["projector"]["skip"])


def test_fresh_soft_tokens_look_like_what_the_layers_read(run: Run) -> None:
    """The projector is calibrated to token embeddings as they enter the first layer, scaled where the family does."""
    embedded = run.model.params["backbone"]["embedding"] * run.inputs.decoder.embedding_scale
    settings = json.loads((run.inputs.directory / "config.json").read_text())
    assert (run.inputs.decoder.embedding_scale > 1) == settings["model_type"].startswith("gemma")
    np.testing.assert_allclose(run.model.params["projector"]["token_std"], np.std(embedded, axis=0), rtol=1e-4)
