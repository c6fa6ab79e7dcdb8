"""Keys of published config.json files: what is inert, what says the family's own way, what is refused and let past."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from helpers import load_backbone
from test_families import config_json

from e2p_jax.backbone.config_reader import INERT
from e2p_jax.backbone.families import FAMILIES, WRAPPERS, parse_config, read_config
from e2p_jax.backbone.tensor_files import Checkpoint
from e2p_jax.cli import main
from e2p_jax.config import BackboneConfig, Config
from e2p_jax.errors import UserError
from e2p_jax.train.setup import read_inputs

SOURCE = Path("some/config.json")
# What transformers 4 wrote of every config: generation, heads of other tasks, how to run.
DUMP: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "max_length": 20,
    "min_length": 0,
    "do_sample": False,
    "early_stopping": False,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "exponential_decay_length_penalty": None,
    "remove_invalid_values": False,
    "output_scores": False,
    "return_dict_in_generate": False,
    "return_dict": True,
    "forced_bos_token_id": None,
    "suppress_tokens": None,
    "decoder_start_token_id": None,
    "pruned_heads": {},
    "use_bfloat16": False,
    "tf_legacy_loss": False,
    "torchscript": False,
    "chunk_size_feed_forward": 0,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "cross_attention_hidden_size": None,
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
}
# Family -> keys that published models of it carry, whatever stands there.
CARRIED: list[tuple[str, dict[str, Any]]] = [
    ("gemma2", {"sliding_window_size": 5}),  # gemma-2-9b
    ("llama", {"unsloth_fixed": True, "unsloth_version": "2024.9"}),
    ("gemma3_text", {"unsloth_fixed": True, "use_bidirectional_attention": False}),
    ("qwen3_moe", {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0}),  # Qwen3-Coder
    ("mistral", DUMP),  # Mistral-7B-v0.3
    ("llama", DUMP),
    ("qwen2", {"internal_version": "x", "neftune_noise_alpha": None, "_model_name_or_path": "models/mine"}),
    ("llama", {"neftune_noise_alpha": 5, "unk_token_id": 0, "_name_or_path": "x"}),  # fine-tunes, GGUF conversions
    ("mistral", {"layer_types": ["full_attention"] * 3, "sliding_window": None}),
    ("olmo2", {"layer_types": ["full_attention"] * 3}),
    ("phi3", {"attention_bias": False, "lm_head_bias": False, "mlp_bias": False, "embd_pdrop": 0.0}),
    ("llama", {"head_dim": 16, "partial_rotary_factor": 1.0, "sliding_window": 0, "use_sliding_window": False}),
    ("qwen2", {"qkv_bias": True, "attention_bias": True, "use_qk_norm": False}),
    ("gpt_oss", {"experts_per_token": 3, "initial_context_length": 4096, "router_aux_loss_coef": 0.9}),
    ("gpt2", {"gradient_checkpointing": False}),
]
# Settings of a rope that change nothing in text.
ROPES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, {"finetuned": True}),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, {"attn_factor": 1.0}),
    ({"rope_type": "default"}, {"mrope_section": [2, 3, 3], "mrope_interleaved": True}),
    ({"rope_type": "default"}, {"rope_type": "mrope", "mrope_section": [2, 3, 3]}),
    ({"rope_type": "default"}, {"factor": 1.0, "original_max_position_embeddings": 256}),
    ({"rope_type": "linear", "factor": 2.0}, {"original_max_position_embeddings": 256}),
]
# What would change a number.
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("gemma2", {"sliding_window_size": 7}),
    ("qwen3_moe", {"qkv_bias": True}),
    ("qwen3_moe", {"use_qk_norm": False}),
    ("qwen3_moe", {"shared_expert_intermediate_size": 24}),
    ("llama", {"pruned_heads": {"0": [1]}}),
    ("llama", {"is_decoder": True}),
    ("llama", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    ("olmo2", {"layer_types": ["sliding_attention"] * 3}),
    ("mistral", {"layer_types": ["full_attention"] * 3, "sliding_window": 5}),
    ("phi3", {"lm_head_bias": True}),
    ("phi3", {"attention_bias": True}),
    ("llama", {"residual_multiplier": 0.2}),
    ("llama", {"per_layer_config": {"0": {"head_dim": 8}}}),
]


def test_what_the_base_config_of_transformers_defines_or_drops_is_inert() -> None:
    base = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    generation = transformers.GenerationConfig._get_default_generation_params()
    assert base - {"is_encoder_decoder"} | generation.keys() <= INERT


@pytest.mark.parametrize(("family", "keys"), CARRIED, ids=lambda x: x if isinstance(x, str) else "")
def test_keys_that_change_nothing_are_read_over(family: str, keys: dict[str, Any]) -> None:
    plain = config_json(family, {key: value for key, value in keys.items() if key in ("head_dim", "sliding_window")})
    assert parse_config(plain | keys, SOURCE) == parse_config(plain, SOURCE)


@pytest.mark.parametrize(("rope", "keys"), ROPES)
def test_settings_of_a_rope_that_change_nothing(rope: dict[str, Any], keys: dict[str, Any]) -> None:
    def parsed(settings: dict[str, Any]) -> Any:
        return parse_config(config_json("qwen2", {"rope_parameters": {"rope_theta": 1e4, **settings}}), SOURCE)

    assert parsed(rope | keys) == parsed(rope)
    with pytest.raises(UserError, match="rope kind"):
        parsed(rope | {"attn_factor": 2.0})


@pytest.mark.parametrize(("family", "keys"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_would_change_a_number_is_refused_by_name(family: str, keys: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="|".join(keys)):
        parse_config(config_json(family) | keys, SOURCE)


def test_an_unknown_key_is_refused_unless_it_is_answered_for() -> None:
    plain = config_json("llama")
    odd = plain | {"mup_scale": 2.0, "zloss": 1e-4}
    with pytest.raises(UserError, match=r"unknown keys \['mup_scale', 'zloss'\]; .* backbone\.ignored_keys"):
        parse_config(odd, SOURCE)
    with pytest.raises(UserError, match=r"unknown keys \['mup_scale'\]"):
        parse_config(odd, SOURCE, ["zloss"])
    assert parse_config(odd, SOURCE, ["mup_scale", "zloss"]) == parse_config(plain, SOURCE)
    with pytest.raises(UserError, match=r"backbone\.ignored_keys: .* has no unknown keys \['rms_norm_eps'\]"):
        parse_config(plain, SOURCE, ["rms_norm_eps"])


def test_what_is_ignored_is_said_and_recorded(
    tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_backbone, tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / "config.json").read_text()) | {"mup_scale": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = Config(backbone=BackboneConfig(path=str(tmp_path), ignored_keys=("mup_scale",)))
    read_inputs(config)
    assert "config.json: mup_scale is ignored, as backbone.ignored_keys says" in capsys.readouterr().err
    assert json.loads(config.to_json())["backbone"]["ignored_keys"] == ["mup_scale"]
    assert load_backbone(tmp_path, ignored_keys=["mup_scale"]).config == read_config(tiny_backbone)


def test_the_commands_that_read_a_backbone_let_keys_past_too(
    tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Flax checkpoint keeps them, for the way back; a table of user vectors says them."""
    odd, flax, back, table = (tmp_path / name for name in ("odd", "flax", "back", "table"))
    shutil.copytree(tiny_backbone, odd)
    (odd / "config.json").write_text(json.dumps(json.loads((odd / "config.json").read_text()) | {"mup_scale": 2.0}))
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"user_id": "ann", "context": ["tea."], "prompt": "hi", "response": "ho"}))
    embed = ["embed", "--data", str(data), "--encoder", "backbone", "--backbone", str(odd), "--out", str(table)]
    for command in (["convert", str(odd), "--out", str(flax)], embed):
        assert main(command) == 1
        assert "unknown keys ['mup_scale']" in capsys.readouterr().err
        assert main([*command, "--ignored-keys", "mup_scale"]) == 0
        assert "warning: " in (said := capsys.readouterr().err) and "mup_scale is ignored" in said
    assert json.loads((table / "meta.json").read_text())["ignored_keys"] == ["mup_scale"]
    assert main(["convert", str(flax), "--out", str(back)]) == 0
    assert Checkpoint(back).fingerprint() == Checkpoint(odd).fingerprint()


@pytest.mark.parametrize("family", WRAPPERS)
def test_no_key_of_a_wrapped_model_is_misread_when_it_is_absent_null_or_renamed(family: str) -> None:
    """Published wrappers leave out of `text_config` what its class has as defaults."""
    whole = config_json(family)
    for key in whole["text_config"].keys() - {"model_type"}:
        rest = {name: value for name, value in whole["text_config"].items() if name != key}
        for text in (rest, whole["text_config"] | {key: None}):
            try:
                ours = parse_config(whole | {"text_config": text}, SOURCE)
                theirs = transformers.CONFIG_MAPPING[family].from_dict(
                    json.loads(json.dumps(whole | {"text_config": text}))
                )
            except Exception as error:
                assert not isinstance(error, AssertionError)
                continue
            assert ours == parse_config(json.loads(theirs.to_json_string(use_diff=False)), SOURCE), key
        if whole["text_config"][key] is not None and key not in INERT:
            with pytest.raises(UserError, match=r"^some/config\.json: "):
                parse_config(whole | {"text_config": rest | {f"x_{key}": whole["text_config"][key]}}, SOURCE)
    with pytest.raises(UserError, match="unknown keys \\['mup_scale'\\]"):
        parse_config(whole | {"mup_scale": 2.0}, SOURCE)
    with pytest.raises(UserError, match="model_type of text_config is 'llama'"):
        parse_config(whole | {"text_config": whole["text_config"] | {"model_type": "llama"}}, SOURCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_key_is_misread_when_it_is_absent_null_or_renamed(family: str) -> None:
    """What is read is what transformers reads, whose own reading, written out in full, means the same; or refused."""
    whole = config_json(family)
    for key in whole.keys() - {"model_type"}:
        rest = {name: value for name, value in whole.items() if name != key}
        for values in (rest, whole | {key: None}):
            try:
                ours = parse_config(values, SOURCE)
                theirs = transformers.CONFIG_MAPPING[family].from_dict(json.loads(json.dumps(values)))
            except Exception as error:
                assert isinstance(error, UserError) or not isinstance(error, AssertionError)
                continue
            assert ours == parse_config(json.loads(theirs.to_json_string(use_diff=False)), SOURCE), key
        if whole[key] is not None and key not in INERT | FAMILIES[family].inert:
            with pytest.raises(UserError, match=rf"x_{key}|{key}"):
                parse_config(rest | {f"x_{key}": whole[key]}, SOURCE)
