"""Llama-3.1-8B, on a TPU v5e-16.

e2p plan llama_8b --topology v5e:4x4
e2p train llama_8b --data.path FILE.jsonl --data.embeddings TABLE
"""

from e2p_jax.config import BackboneConfig, Config, DataConfig, MeshConfig, TrainConfig

config = Config(
    backbone=BackboneConfig(path="meta-llama/Llama-3.1-8B", dtype="bfloat16", remat=True),
    data=DataConfig(
        path="data/persona_chat/self_original/1.0.0", embeddings="data/persona_chat/embeddings", seq_len=2048
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
    train=TrainConfig(rows=32),
)
