"""The main job on the embedded default: generated personas in front of the small backbone in the package."""

from e2p_jax.config import Config, DataConfig, EvaluateConfig, TrainConfig

config = Config(
    data=DataConfig(path="synthetic", embeddings="synthetic", seq_len=256),
    train=TrainConfig(steps=400, rows=8, learning_rate=3e-3, eval_every=100, checkpoint_every=100),
    evaluate=EvaluateConfig(
        prompts=("what do you do for fun?", "do you play an instrument?", "can i get you a drink?"),
    ),
)
