"""The embedded backbone without its weights: tokenizer, chat template, config.json.

    python benchmarks/embedded_backbone/skeleton.py --corpus corpus.jsonl --out skeleton

`e2p train backbone --backbone.path skeleton --data.path corpus.jsonl` then trains the weights.
"""

import json
from pathlib import Path

import tyro
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from e2p_jax.datasets.prepared import load_records
from e2p_jax.files import replace_directory

VOCABULARY = 4096
SPECIAL = ["<pad>", "<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]  # ids 0 to 5
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 5,
    "pad_token_id": 0,
    "dtype": "float32",
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "<|end|>",
    "pad_token": "<pad>",
    "additional_special_tokens": SPECIAL[2:5],
    "model_max_length": 512,
    "clean_up_tokenization_spaces": False,
}
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|' + message['role'] + '|>' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}
            {{- ' ' + message['content'] + eos_token -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- ' ' + message['content'] + eos_token -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""


def main(corpus: Path, out: Path) -> None:
    """Trains a lower-cased byte-level BPE on the corpus and writes the directory.

    Args:
      corpus: What corpus.py wrote.
      out: Directory to write.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    texts = (" " + message["content"] for record in load_records(str(corpus), "train") for message in record.messages)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    with replace_directory(out) as temporary:
        tokenizer.save(str(temporary / "tokenizer.json"))
        files = {
            "config.json": CONFIG,
            "tokenizer_config.json": TOKENIZER_CONFIG,
            "generation_config.json": {key: CONFIG[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        }
        for name, values in files.items():
            (temporary / name).write_text(json.dumps(values, indent=2) + "\n")
        (temporary / "chat_template.jinja").write_text(CHAT_TEMPLATE)


if __name__ == "__main__":
    tyro.cli(main)
