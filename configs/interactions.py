"""What a user wants next: the title of a song, an episode, a film, in front of the embedded backbone or of any other.

    e2p prepare interactions/time --manual-dir DIR --data-dir data --set question="What do I listen to next?"
    e2p embed --data DATA --encoder als --out data/interactions/embeddings
    e2p train interactions --data.path DATA --data.embeddings data/interactions/embeddings

DIR holds a log of one's own, or Last.fm or MovieLens as they come (docs/data.md); DATA is the directory that the first
command prints. Without `--set` that is what stands below. A log without times is `interactions/leave_last_out`.
"""

from e2p_jax.config import Config, DataConfig, EvaluateConfig, TrainConfig

config = Config(
    data=DataConfig(
        path="data/interactions/time/1.0.0",
        embeddings="data/interactions/embeddings",
        eval_splits=(
            "validation",
            "test",
        ),  # of the same users: nobody is left for `dev`, the last counts
    ),
    train=TrainConfig(steps=500, rows=8, learning_rate=3e-3, eval_every=100, checkpoint_every=100),
    evaluate=EvaluateConfig(measures=("ranking",)),
)
