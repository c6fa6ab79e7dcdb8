"""Trains the small backbone that ships with the package, from random weights on the dialogue corpus.

    e2p train backbone --backbone.path DIR --data.path DIR     (DIRs: see docs/backbone.md)
"""

from e2p_jax.config import BackboneConfig, Config, DataConfig, EvaluateConfig, TrainConfig

config = Config(
    backbone=BackboneConfig(weights="random"),
    data=DataConfig(path="dialogue_corpus", condition="none", targets="all", seq_len=384),
    train=TrainConfig(
        trainable=("backbone/**",),
        steps=3500,
        rows=10,
        learning_rate=4e-3,
        warmup_steps=100,
        final_learning_rate=0.02,
        weight_decay=0.05,
        eval_every=500,
        checkpoint_every=100,
    ),
    evaluate=EvaluateConfig(conditions=()),
)
