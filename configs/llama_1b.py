"""Llama-3.2-1B, on a TPU v5e-8.

e2p plan llama_1b --topology v5e:2x4
e2p train llama_1b --data.path FILE.jsonl --data.embeddings TABLE
"""

from e2p_jax.config import BackboneConfig, Config, DataConfig, MeshConfig, TrainConfig

config = Config(
    backbone=BackboneConfig(path="meta-llama/Llama-3.2-1B", dtype="bfloat16", remat=True),
    data=DataConfig(
        path="data/persona_chat/self_original/1.0.0", embeddings="data/persona_chat/embeddings", seq_len=2048
    ),
    mesh=MeshConfig(data=-1, fsdp=1),
    train=TrainConfig(rows=16),
)
