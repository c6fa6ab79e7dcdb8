"""Trains the small backbone that ships with the package, from random weights on the dialogue corpus.

e2p train backbone --backbone.path DIR --data.path FILE     (see docs/backbone.md)
"""

from e2p_jax.config import BackboneConfig, Config, DataConfig, EvaluateConfig, TrainConfig

config = Config(
    backbone=BackboneConfig(weights="random"),
    data=DataConfig(path="corpus.jsonl", condition="none", seq_len=256),
    train=TrainConfig(
        trainable=("backbone/**",),
        steps=8000,
        rows=4,
        learning_rate=1e-3,
        warmup_steps=100,
        final_learning_rate=0.05,
        weight_decay=0.05,
        eval_every=500,
        checkpoint_every=250,
        log_every=50,
    ),
    evaluate=EvaluateConfig(conditions=()),
)
