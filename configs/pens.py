"""Headlines for a reader of news, in front of the embedded backbone or of any other.

    e2p prepare pens --manual-dir DIR --data-dir data
    e2p embed --data data/pens/headlines/1.0.0 --encoder ENCODER --out data/pens/embeddings
    e2p train pens

DIR holds PENS's `news.tsv`, `train.tsv`, `valid.tsv` and `personalized_test.tsv`. A whole article and 50 headlines are
more than the embedded backbone's 512 positions: prepare with `--set body_words=100 context=10` for it.
"""

from e2p_jax.config import Config, DataConfig, EvaluateConfig, TrainConfig

config = Config(
    data=DataConfig(
        path="data/pens/headlines/1.0.0",
        embeddings="data/pens/embeddings",
        eval_splits=("validation", "test"),
    ),
    train=TrainConfig(steps=500, rows=8, learning_rate=3e-3, eval_every=100, checkpoint_every=100),
    evaluate=EvaluateConfig(measures=("texts",)),
)
