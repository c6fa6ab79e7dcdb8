"""Every family as an exported model, each with another way to make and place the prefix; all ways occur."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import LLAMA3, make_backbone, untrained_run

from e2p_jax.datasets import synthetic
from e2p_jax.datasets.records import Record
from e2p_jax.evaluate.evaluation import evaluate
from e2p_jax.evaluate.generate import Sampling, generate, vectors_for
from e2p_jax.export.import_back import import_transformers
from e2p_jax.export.transformers import export_transformers
from e2p_jax.train.run import Run, open_run

PLACES = itertools.product(["before_reply", "before_bos", "after_bos", "in_chat"], [1, 3])
WAYS = [(*place, kind) for place, kind in zip(PLACES, itertools.cycle(["mlp", "linear", "linear", "mlp"]))]
# Families whose exports differ in kind; tests/backbone/test_family_parity.py has the others.
EXPORTED = (
    *("llama", "mistral", "qwen3", "phi3", "smollm3", "qwen3_5", "gemma", "gemma2", "gpt2", "mixtral", "deepseek_v3"),
    *("granite", "gemma3"),  # a wrapper, as qwen3_5 is: what is exported is its `gemma3_text`
)
MODELS: list[tuple[str, dict[str, Any]]] = [*((name, {}) for name in EXPORTED), ("llama", {"rope_parameters": LLAMA3})]
USERS = ["user-1", "user-2", "user-3"]
QUESTIONS = ["hi!", "what do you like to eat?", "where do you live, and do you have any pets?"]
NEW = 8


@dataclasses.dataclass(frozen=True)
class Exported:
    """A run that was never trained, and its export in torch."""

    family: str
    run: Run
    directory: Path
    model: Any
    tokenizer: Any

    def vectors(self, users: list[str]) -> torch.Tensor:
        return torch.tensor(vectors_for(self.run, users, users, "e2p"))


@pytest.fixture(params=zip(MODELS, itertools.cycle(WAYS)), scope="module", ids=lambda p: f"{p[0][0]}-{p[1]}")
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    (family, changes), (placement, num_tokens, kind) = request.param
    folder = tmp_path_factory.mktemp(family)
    backbone = make_backbone(folder / "backbone", family, changes)
    run = untrained_run(folder, backbone, placement, num_tokens, kind)
    export_transformers(run, folder / "out", include_backbone=True)
    return Exported(family, run, folder / "out", *load(folder / "out"))


def load(directory: Path) -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, padding_side="left", trust_remote_code=False)
    return model, tokenizer


def spoken() -> list[Record]:
    return [dataclasses.replace(synthetic.record(number), user_id=f"user-{number}") for number in (1, 2, 3)]


def asked() -> list[Record]:
    """One user has been answered before."""
    before = ({"role": "user", "content": "so?"}, {"role": "assistant", "content": "yes."})
    said = zip(USERS, ((), before, ()), QUESTIONS, strict=True)
    return [Record(user, (), (*early, {"role": "user", "content": text}), source=user) for user, early, text in said]


def encode(tokenizer: Any, records: list[Record], **options: Any) -> Any:
    return tokenizer.apply_chat_template(
        [list(record.messages) for record in records], padding=True, return_tensors="pt", return_dict=True, **options
    )


def nats(exported: Exported, model: Any, side: str) -> list[float]:
    """Summed over each conversation's targets, in one batch of different users with the padding on one side."""
    exported.tokenizer.padding_side = side
    encoded = encode(exported.tokenizer, spoken(), return_assistant_tokens_mask=True)
    exported.tokenizer.padding_side = "left"
    masks = torch.as_tensor(encoded.pop("assistant_masks"), dtype=torch.bool)
    labels = encoded["input_ids"].masked_fill(~masks, -100)
    vectors = exported.vectors(USERS)
    with torch.no_grad():
        wanted = model.with_prefix(encoded["input_ids"], encoded["attention_mask"], vectors, labels, {})["labels"]
        logits = model(**encoded, user_embedding=vectors).logits
    scores = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten(), ignore_index=-100, reduction="none"
    )
    return scores.view(len(labels), -1).sum(dim=1).tolist()


def test_nll_of_every_example_is_the_same(exported: Exported):
    lines = evaluate(exported.run, spoken(), "all", ["e2p", "none"]).per_example().splitlines()
    nll = [json.loads(line)["nll"] for line in lines]
    ours, without = nll[:3], nll[3:]
    for side in ("left", "right"):
        assert nats(exported, exported.model, side) == pytest.approx(ours, rel=1e-4), side
    assert ours != pytest.approx(without, rel=2e-4)


def test_answers_are_the_same(exported: Exported):
    """Three users in one batch padded on either side, the pipeline, and beams, which are one by one what they are
    together.
    """
    vectors = exported.vectors(USERS)
    ours = generate(exported.run, asked(), vectors.numpy(), "e2p", Sampling(max_new_tokens=NEW))
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    for side in ("right", "left"):
        exported.tokenizer.padding_side = side
        inputs = encode(exported.tokenizer, asked(), add_generation_prompt=True)
        start = inputs["input_ids"].shape[1]
        out = exported.model.generate(**inputs, user_embedding=vectors, **options)
        assert [t.strip() for t in exported.tokenizer.batch_decode(out[:, start:], skip_special_tokens=True)] == ours
    pipe = transformers.pipeline("text-generation", model=exported.model, tokenizer=exported.tokenizer)
    for record, vector, answer in zip(asked(), vectors, ours, strict=True):
        (said,) = pipe(list(record.messages), user_embedding=vector, **options)
        assert said["generated_text"][-1]["content"].strip() == answer
    beams = exported.model.generate(**inputs, user_embedding=vectors, num_beams=3, **options)
    for row in range(len(USERS)):
        alone = {
            name: value[row : row + 1, -int(inputs["attention_mask"][row].sum()) :] for name, value in inputs.items()
        }
        one = exported.model.generate(**alone, user_embedding=vectors[row], num_beams=3, **options)
        length = alone["input_ids"].shape[1]
        new = one[0, length:]
        assert torch.equal(beams[row, start : start + len(new)], new)


def test_checkpointed_gradients_are_the_same(exported: Exported):
    encoded = encode(exported.tokenizer, spoken())
    model, vectors = exported.model, exported.vectors(USERS)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(**encoded, user_embedding=vectors, labels=encoded["input_ids"], use_cache=False).loss.backward()
        return model.projector.skip.weight.grad.clone()

    plain = gradient()
    for part in model.modules():  # only in training is anything checkpointed, and GPT-2 has a dropout there
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    model.train()
    model.activation_checkpointing_enable()
    saved = gradient()
    model.activation_checkpointing_disable()
    model.eval()
    assert plain.abs().max() > 0
    torch.testing.assert_close(saved, plain)


def test_imported_back_it_is_the_same(exported: Exported, tmp_path: Path):
    """The backbone's tensors get back the names that they had (GPT-2's without a head), and so its fingerprint."""
    wrapped = exported.run.inputs.decoder.wrapped
    include_backbone = exported.run.inputs.encoder.num_tokens > 1  # GPT-2's and half of the others
    export_transformers(exported.run, tmp_path / "out", include_backbone)
    if wrapped:
        export_transformers(exported.run, tmp_path / "named", include_backbone=False)
        named, _ = load(tmp_path / "named")
        assert nats(exported, named, "left") == pytest.approx(nats(exported, exported.model, "left"), rel=1e-6)
    import_transformers(tmp_path / "out", tmp_path / "run")
    again, run = open_run(tmp_path / "run"), exported.run
    if not (include_backbone and wrapped):  # what goes along is the language model alone
        assert again.model.fingerprint == run.model.fingerprint
    assert all(np.array_equal(again.model.params["projector"][n], v) for n, v in run.model.params["projector"].items())


def test_fresh_soft_tokens_look_like_what_the_layers_read(exported: Exported):
    """The projector is calibrated to token embeddings as they enter the first layer, scaled where the family does."""
    run = exported.run
    embedded = run.model.params["backbone"]["embedding"] * run.inputs.decoder.embedding_scale
    assert (run.inputs.decoder.embedding_scale > 1) == exported.family.startswith("gemma")
    np.testing.assert_allclose(run.model.params["projector"]["token_std"], np.std(embedded, axis=0), rtol=1e-4)
    if exported.family in ("gemma", "gemma2"):  # as in versions of transformers that scale `inputs_embeds`
        unscaled = transformers.AutoModelForCausalLM.from_config(exported.model.config.backbone_config)
        unscaled.set_input_embeddings(torch.nn.Embedding(4096, 32))
        with pytest.raises(ValueError, match="upgrade transformers"):
            type(exported.model)(exported.model.config, unscaled)
