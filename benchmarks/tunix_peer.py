"""Tunix's PEFT trainer, Google's for language models in JAX: `pip install google-tunix`, which nothing here needs."""

import functools
import importlib.util
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch_peers
import work
from flax import nnx
from peers import LeftOut, Peer, Stage

from e2p_jax.backbone.families import read_config


class Prefixed(nnx.Module):
    """Tunix's Llama behind a projector: its layers as they are, logits at every position."""

    def __init__(self, backbone: Any, values: dict[str, np.ndarray]):
        self.backbone = backbone
        for name, value in values.items():  # the trainer trains what is a LoRAParam, and nothing else
            kind = nnx.Variable if name.startswith(("input_", "token_")) else nnx.LoRAParam
            setattr(self, name, kind(jnp.asarray(value)))

    def soft_tokens(self, vectors: jax.Array) -> jax.Array:
        """[B, E] -> [B, D]."""
        x = (vectors - self.input_mean[None]) / self.input_std[None]
        hidden = jax.nn.silu(x @ self.up[...] + self.up_bias[None])
        y = x @ self.skip[...] + self.bias[None] + hidden @ self.down[...]
        return self.token_mean[None] + self.token_std[None] * y

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, cache: None, mask: jax.Array, *, vectors: jax.Array
    ) -> tuple[jax.Array, None]:
        backbone = self.backbone
        x = backbone.embedder.encode(tokens)
        x = x.at[:, 0].set(self.soft_tokens(vectors).astype(x.dtype))
        for layer in backbone.layers:
            _, x = layer(x, positions, cache, mask)
        x = backbone.final_norm(x)
        return backbone.embedder.decode(x) if backbone.config.weight_tying else backbone.lm_head(x), None


def tunix(stage: Stage) -> Peer:
    """Its trainer's step on conversations, as many as we have rows, one a row and padded: it packs nothing.

    Raises:
      LeftOut: it is not installed, or its Llama is not this one.
    """
    if importlib.util.find_spec("tunix") is None:
        raise LeftOut("it is not installed: pip install google-tunix")
    from tunix.models.llama3 import model as llama
    from tunix.models.llama3.params import create_model_from_safe_tensors
    from tunix.sft import peft_trainer

    config = read_config(stage.directory)
    rope = json.loads((stage.directory / "config.json").read_text())["rope_parameters"]
    if rope["rope_type"] != "default":
        raise LeftOut(f"its Llama has no rotation of type {rope['rope_type']}")
    # Its attention never hands its config's rope_theta on, and turns by a base of a million whatever that says.
    llama.apply_rope = functools.partial(llama.apply_rope, rope_theta=rope["rope_theta"])
    backbone = create_model_from_safe_tensors(
        str(stage.directory),
        llama.ModelConfig(
            num_layers=config.num_layers,
            vocab_size=config.vocab_size,
            embed_dim=config.hidden_size,
            hidden_dim=config.intermediate_size,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            num_kv_heads=config.num_kv_heads,
            rope_theta=rope["rope_theta"],
            norm_eps=config.norm_epsilon,
            weight_tying=config.tie_head,
        ),
        dtype=jnp.dtype(str(stage.dtype).removeprefix("torch.")),
    )

    def loss(
        model: Prefixed,
        input_tokens: jax.Array,
        input_mask: jax.Array,
        positions: jax.Array,
        attention_mask: jax.Array,
        vectors: jax.Array,
    ) -> jax.Array:
        theirs = peft_trainer._default_loss_fn
        return theirs(functools.partial(model, vectors=vectors), input_tokens, input_mask, positions, attention_mask)

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    settings = peft_trainer.TrainingConfig(eval_every_n_steps=1)
    trainer = peft_trainer.PeftTrainer(Prefixed(backbone, stage.projector), optimizer, settings).with_loss_fn(loss)
    step, evaluate = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
    first = inputs(stage.work.conversations(stage.work.rows[:1]))
    batch = inputs(work.some(stage.work.conversations(stage.work.rows), len(stage.work.rows)))
    targets = int(batch["input_mask"].sum())
    return Peer("Tunix PEFT trainer", lambda: float(evaluate(first)[0]), lambda: step(batch)[0], targets)


def inputs(conversations: work.Conversations) -> dict[str, np.ndarray]:
    """Conversations as Tunix's loss wants them."""
    batch = torch_peers.padded(conversations, "cpu")
    seen = batch["attention_mask"].bool().numpy()
    length = seen.shape[1]
    return {
        "input_tokens": batch["tokens"].int().numpy(),
        "input_mask": (batch["labels"] >= 0).numpy(),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), seen.shape),
        "attention_mask": np.tril(np.ones((length, length), bool))[None] & seen[:, None, :],
        "vectors": batch["vectors"].numpy(),
    }
