"""What a user wants next: a song, an episode, a film, in front of the embedded backbone or of any other.

    e2p prepare interactions/time --manual-dir DIR --data-dir data --set folds=5 held_out_targets=10
    e2p embed --data DATA --encoder als --out data/interactions/embeddings
    e2p train interactions --data.path DATA --data.embeddings data/interactions/embeddings

DIR holds a log of one's own, or Last.fm or MovieLens as they come (docs/data.md); DATA is the directory that the first
command prints. `e2p embed` writes the users' vectors and, beside them, the items' (`embeddings-items`): with those the
items are tokens of a vocabulary of their own, and titles follow the item that is picked. A log without times is
`interactions/leave_last_out`.
"""

from e2p_jax.config import Config, DataConfig, EvaluateConfig, ItemsConfig, TrainConfig
from e2p_jax.prefix import mlp

config = Config(
    data=DataConfig(
        path="data/interactions/time/1.0.0",
        embeddings="data/interactions/embeddings",
        items="auto",
        seq_len=256,
        eval_splits=("validation", "test"),
    ),
    items=ItemsConfig(text_weight=1.0, token=True),
    projector=mlp.Settings(num_tokens=4),
    train=TrainConfig(steps=400, rows=8, learning_rate=1e-2, eval_every=100, checkpoint_every=100),
    evaluate=EvaluateConfig(conditions=("none", "shuffled", "e2p"), measures=("items",), max_records=0),
)
