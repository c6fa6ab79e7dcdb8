"""An exported model called as models are called: padded on either side, without a mask, cast, saved again."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import untrained_run
from test_export_families import USERS, asked, encode, load

from e2p_jax.evaluate.generate import vectors_for
from e2p_jax.export.import_back import import_transformers
from e2p_jax.export.transformers import export_transformers
from e2p_jax.train.run import Run, open_run

ANSWER: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


@dataclasses.dataclass(frozen=True)
class Exported:
    run: Run
    directory: Path  # the backbone is named there
    model: Any
    tokenizer: Any
    vectors: torch.Tensor

    def prompts(self, side: str) -> dict[str, torch.Tensor]:
        """Three of three lengths."""
        self.tokenizer.padding_side = side
        return dict(encode(self.tokenizer, asked(), add_generation_prompt=True))

    @functools.cached_property
    def alone(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each prompt without padding, [1, T], and its answer, [6]."""
        padded, pairs = self.prompts("left"), []
        for ids, mask, vector in zip(padded["input_ids"], padded["attention_mask"], self.vectors, strict=True):
            ids = ids[mask.bool()][None]
            pairs.append((ids, self.model.generate(ids, user_embedding=vector, **ANSWER)[0, ids.shape[1] :]))
        return pairs


@pytest.fixture(scope="module")
def exported(lively_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("calls")
    run = untrained_run(folder, lively_backbone, "after_bos", 1, "mlp")
    export_transformers(run, folder / "out", include_backbone=False)
    return Exported(run, folder / "out", *load(folder / "out"), torch.tensor(vectors_for(run, USERS, USERS, "e2p")))


@pytest.fixture(params=[True, False], ids=["ends turns", "pads only"])
def stops_that_pad(exported: Exported, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the padding token is among those that end a turn, or has no other meaning."""
    settings = exported.model.generation_config
    monkeypatch.setattr(settings, "eos_token_id", [settings.pad_token_id, 5] if request.param else 5)
    return request.param


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_without_a_mask_is_told_from_text_or_refused(exported: Exported, stops_that_pad: bool, side: str):
    prompts = exported.prompts(side)
    del prompts["attention_mask"]
    if stops_that_pad:
        with pytest.raises(ValueError, match="pass the tokenizer's attention_mask"):
            exported.model.generate(**prompts, user_embedding=exported.vectors, **ANSWER)
        with pytest.raises(ValueError, match="pass the tokenizer's attention_mask"):
            exported.model(**prompts, user_embedding=exported.vectors)
        return
    answers = exported.model.generate(**prompts, user_embedding=exported.vectors, **ANSWER)
    for answer, (_, alone) in zip(answers, exported.alone, strict=True):
        assert torch.equal(answer[-len(alone) :], alone)


@pytest.mark.parametrize("cast", [torch.Tensor.bool, torch.Tensor.float])
def test_masks_of_other_kinds(exported: Exported, cast: Callable):
    prompts = exported.prompts("right")
    prompts["attention_mask"] = cast(prompts["attention_mask"])
    answers = exported.model.generate(**prompts, user_embedding=exported.vectors, num_return_sequences=1, **ANSWER)
    for answer, (_, alone) in zip(answers, exported.alone, strict=True):
        assert torch.equal(answer[-len(alone) :], alone)


def test_right_padded_samples_and_beams_begin_with_their_prompts(exported: Exported):
    prompts = exported.prompts("right")
    out = exported.model.generate(
        **prompts,
        user_embedding=exported.vectors,
        num_beams=2,
        num_return_sequences=2,
        return_dict_in_generate=True,
        **ANSWER,
    )
    width = prompts["input_ids"].shape[1]
    assert torch.equal(out.sequences[:, :width], prompts["input_ids"].repeat_interleave(2, dim=0))
    for row, (ids, _) in enumerate(exported.alone):
        one = exported.model.generate(
            ids, user_embedding=exported.vectors[row], num_beams=2, num_return_sequences=2, **ANSWER
        )
        assert torch.equal(out.sequences[2 * row : 2 * row + 2, width:], one[:, ids.shape[1] :])


def test_rows_of_padding(exported: Exported):
    """Nothing can follow such a row; in training it fills up a batch, and the others' losses stay what they are."""
    prompts, vectors = exported.prompts("left"), exported.vectors
    prompts["attention_mask"][1] = 0
    with pytest.raises(ValueError, match="row 1 of input_ids is all padding"):
        exported.model.generate(**prompts, user_embedding=vectors, **ANSWER)
    with torch.no_grad():
        filled = exported.model(**prompts, user_embedding=vectors).logits
        rest = {name: value[[0, 2]] for name, value in prompts.items()}
        torch.testing.assert_close(filled[[0, 2]], exported.model(**rest, user_embedding=vectors[[0, 2]]).logits)
    assert filled.isfinite().all()


def test_what_has_no_place_for_the_soft_tokens_is_refused(exported: Exported):
    model, vector = exported.model, exported.vectors[0]
    ((ids, _), *_) = exported.alone
    embeds = torch.zeros(1, 3, 32)
    for call in (model.__call__, model.generate):
        with pytest.raises(ValueError, match="input_ids is needed, not inputs_embeds"):
            call(ids, inputs_embeds=embeds, user_embedding=vector)
        with pytest.raises(ValueError, match=r"input_ids has shape \(1, 0\)"):
            call(ids[:, :0], user_embedding=vector)
        with pytest.raises(ValueError, match=r"attention_mask has shape \(1, \d+\); needs"):
            call(ids, torch.ones(1, ids.shape[1] + 1), user_embedding=vector)
    with pytest.raises(ValueError, match=r"position_ids has \d+ columns; needs \d+"):
        model(ids, user_embedding=vector, position_ids=torch.arange(ids.shape[1])[None])
    first = model(ids, user_embedding=vector, use_cache=True)
    with pytest.raises(ValueError, match="in the cache already: go on from it with model"):
        model(ids[:, -1:], user_embedding=vector, cache=first.cache)


def test_a_conversation_goes_on_from_its_cache(exported: Exported):
    ((ids, _), *_) = exported.alone
    model, vector = exported.model, exported.vectors[0]
    first = model.generate(ids, user_embedding=vector, return_dict_in_generate=True, **ANSWER)
    longer = torch.cat([first.sequences, ids[:, 1:]], dim=1)
    afresh = model.generate(longer, user_embedding=vector, **ANSWER)
    assert torch.equal(model.generate(longer, user_embedding=vector, cache=first.cache, **ANSWER), afresh)
    padded = torch.cat([ids, torch.zeros_like(ids[:, :1])], dim=1)
    with pytest.raises(ValueError, match="pad on the left"):
        model.generate(padded, (padded != 0).long(), vector, cache=first.cache, **ANSWER)


def test_lengths_and_penalties_are_those_of_prompt_and_answer(exported: Exported):
    """As of a prompt of tokens: no soft token is counted, and what the prompt says is penalised."""
    ((ids, answer), *_) = exported.alone
    model, vector, total = exported.model, exported.vectors[0], ids.shape[1] + 4
    for settings in ({"max_length": total}, {"generation_config": transformers.GenerationConfig(max_length=total)}):
        out = model.generate(ids, user_embedding=vector, do_sample=False, **settings)
        assert torch.equal(out[0], torch.cat([ids[0], answer[:4]]))
    likeliest = torch.cat([ids, answer[None, :1]], dim=1)  # the prompt says it already
    options = {**ANSWER, "return_dict_in_generate": True, "output_scores": True}
    free, penalised = (
        model.generate(likeliest, user_embedding=vector, repetition_penalty=penalty, **options)
        for penalty in (1.0, 2.0)
    )
    raised = free.scores[0] != penalised.scores[0]
    assert set(raised[0].nonzero().flatten().tolist()) == set(likeliest[0].tolist())


CASTS = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.to("cpu", torch.bfloat16),
    "double": lambda model: model.to(torch.float64),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casts_leave_the_projector_in_float32(exported: Exported, cast: Callable):
    """Its values too: they are not rounded on the way."""
    model, _ = load(exported.directory)
    cast(model)
    dtype = model.get_input_embeddings().weight.dtype
    assert dtype != torch.float32
    for name, value in model.projector.state_dict().items():
        assert torch.equal(value, exported.model.projector.state_dict()[name]), name
    prompts = exported.prompts("left")
    with torch.no_grad():
        logits = model(**prompts, user_embedding=exported.vectors).logits
        wanted = exported.model(**prompts, user_embedding=exported.vectors).logits
        soft = exported.model.soft_tokens(exported.vectors, prompts["input_ids"])
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.soft_tokens(exported.vectors, prompts["input_ids"]), soft)
    assert logits.dtype == dtype
    real = torch.cat([prompts["attention_mask"], torch.ones(3, 1)], dim=1).bool()  # padding's logits are nobody's
    assert (logits - wanted)[real].norm() < 0.05 * wanted[real].norm()
    assert model.generate(**prompts, user_embedding=exported.vectors, **ANSWER).shape == (3, real.shape[1] + 5)


def test_a_named_backbone_answers_as_one_that_came_along(exported: Exported, tmp_path: Path):
    """The tokens that end a reply stand beside the projector, not beside the backbone."""
    export_transformers(exported.run, tmp_path / "whole", include_backbone=True)
    whole, _ = load(tmp_path / "whole")
    assert exported.model.generation_config.to_diff_dict() == whole.generation_config.to_diff_dict()
    assert (
        transformers.AutoModelForCausalLM.from_pretrained(
            exported.directory, trust_remote_code=True, torch_dtype=torch.bfloat16
        ).dtype
        == torch.bfloat16
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saved_with_its_backbone_whatever_it_was_read_from(exported: Exported, tmp_path: Path, dtype: torch.dtype):
    model, _ = load(exported.directory)
    with torch.no_grad():
        model.backbone.model.norm.weight += 0.5  # as fine-tuning in torch would
    model.to(dtype).save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True, dtype="auto")
    assert again.dtype == dtype and again.projector.skip.weight.dtype == torch.float32
    assert again.generation_config.eos_token_id == exported.model.generation_config.eos_token_id
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_saved_unchanged_it_is_imported(exported: Exported, tmp_path: Path):
    model, tokenizer = load(exported.directory)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    import_transformers(tmp_path / "saved", tmp_path / "run")
    assert open_run(tmp_path / "run").model.fingerprint == exported.run.model.fingerprint
