"""The second training of configs/smollm2.py: on from there, what all users share, in front of the dialogues alone."""

from e2p_jax.config import load_config

config = load_config("smollm2")[1].change(
    data={"train_split": "dialogues"},
    projector={"start": "runs/smollm2"},
    train={
        "trainable": ("projector/bias", "projector/shared"),
        "bias_learning_rate": 0.25,
        "steps": 60,
        "eval_every": 60,
    },
)
