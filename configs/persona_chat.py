"""Persona-Chat in front of the embedded backbone, or of any other.

    e2p prepare persona_chat --manual-dir DIR --data-dir data
    e2p train persona_chat

DIR holds `train_self_original.txt` and `valid_self_original.txt` of the public release, and beside them
`train_embeddings.npy` and `valid_embeddings.npy`: row i is the vector of dialogue i's user.
"""

from e2p_jax.config import Config, DataConfig, EvaluateConfig, TrainConfig
from e2p_jax.prefix import mlp

config = Config(
    data=DataConfig(
        path="data/persona_chat/self_original/1.0.0",
        embeddings="data/persona_chat/embeddings",
        eval_splits=("validation", "validation_seen"),
    ),
    projector=mlp.Settings(dropout=0.1),
    train=TrainConfig(steps=200, rows=8, learning_rate=1e-3, weight_decay=0.1, eval_every=50, checkpoint_every=50),
    evaluate=EvaluateConfig(prompts=("hi , what do you do for fun ?", "do you have any pets ?")),
)
