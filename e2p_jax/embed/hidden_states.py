"""User vectors from the frozen backbone itself: the mean of a layer's hidden states over the context's tokens."""

import dataclasses
import functools
from collections.abc import Collection, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from e2p_jax.backbone import weights
from e2p_jax.backbone.decoder import Decoder, of_layers
from e2p_jax.backbone.families import say_ignored
from e2p_jax.backbone.layout import Execution
from e2p_jax.config import MeshConfig
from e2p_jax.data import control
from e2p_jax.data.encode import load_tokenizer
from e2p_jax.embed.contexts import vectors_of_contexts
from e2p_jax.errors import UserError
from e2p_jax.parallel.mesh import make_mesh, param_sharding
from e2p_jax.products import einsum
from e2p_jax.terminal import say

_MULTIPLE = 64  # texts are padded to a multiple, so that few lengths are compiled
_TOKENS = 1 << 12  # about, in a batch
_LONGEST = 2048  # tokens of a context that are read


def embed(
    data: str, backbone: str, layer: int, ignored_keys: Collection[str], blocks: int
) -> tuple[Sequence[str], np.ndarray]:
    """Ids of all users, and vectors of their contexts; see `backbone_vectors`."""
    directory = weights.resolve(backbone, None)
    for line in say_ignored(directory, ignored_keys):
        say(f"warning: {line}")
    return vectors_of_contexts(data, lambda texts: backbone_vectors(texts, directory, layer, ignored_keys), blocks)


def backbone_vectors(
    contexts: Sequence[tuple[str, ...]], directory: Path, layer: int, ignored_keys: Collection[str] = ()
) -> np.ndarray:
    """The context, one sentence a line, goes through the backbone as plain text.

    Args:
      contexts: N contexts.
      directory: of a Hugging Face model.
      layer: how many layers are gone through; negative counts from the last one, whose states are those after the
        final norm (transformers' `hidden_states[layer]`).
      ignored_keys: of config.json, as `backbone.ignored_keys`.

    Returns:
      [N, D] float32.

    Raises:
      UserError: the directory is no backbone, or has fewer layers; or a context that its embedding has no row for.
    """
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    with jax.set_mesh(mesh):
        decoder = _first_layers(directory, layer, mesh, ignored_keys)
        tokenizer = load_tokenizer(directory, decoder.config.vocab_size)
        limit = min(decoder.config.max_positions, _LONGEST)
        groups = control.break_up(tokenizer, control.control_tokens(tokenizer, str(tokenizer.chat_template), (), ()))
        texts = (control.as_text("\n".join(context), groups) for context in contexts)
        encoded = [tokenizer(text)["input_ids"][:limit] for text in texts]
        for number, tokens in enumerate(encoded):
            if (largest := max(tokens, default=0)) >= decoder.config.vocab_size:
                raise UserError(
                    f"context {number}: the token {tokenizer.convert_ids_to_tokens(largest)!r} has id {largest}, but "
                    f"the backbone's embedding has {decoder.config.vocab_size} rows; take it out of the text"
                )
        return _means(decoder, [np.asarray(tokens, np.int32) for tokens in encoded])


def _first_layers(directory: Path, layer: int, mesh: Mesh, ignored_keys: Collection[str] = ()) -> Decoder:
    """A decoder whose output is the hidden state after `layer` layers."""
    dtype = weights.choose_dtype("auto", jax.default_backend())
    place = functools.partial(param_sharding, mesh)
    decoder = weights.load(directory, dtype=dtype, sharding=place, ignored_keys=ignored_keys)
    decoder.execution = Execution(sort_tokens=True)
    config = decoder.config
    depth = layer if layer >= 0 else config.num_layers + 1 + layer
    if not 1 <= depth <= config.num_layers:
        last = config.num_layers
        raise UserError(f"--layer {layer}: {directory} has layers 1 to {last}, or -1 to -{last} from the end")
    if depth == config.num_layers:
        return decoder
    windows, ropes = config.windows[:depth], config.layer_ropes[:depth]
    dense, linear = (
        tuple(layer for layer in layers if layer < depth) for layers in (config.dense_layers, config.linear_layers)
    )
    decoder.config = dataclasses.replace(
        config, num_layers=depth, windows=windows, layer_ropes=ropes, dense_layers=dense, linear_layers=linear
    )
    nnx.update(decoder.layers, of_layers(nnx.to_pure_dict(nnx.state(decoder.layers)), config, 0, depth))
    for name in ("final_norm", "final_norm_bias"):
        if hasattr(decoder, name):
            delattr(decoder, name)
    return decoder


def _means(decoder: Decoder, texts: Sequence[np.ndarray]) -> np.ndarray:
    """Longest first, as many in a batch as give about `_TOKENS` tokens."""

    @nnx.jit
    def run(decoder: Decoder, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        inside = (positions < lengths[:, None]).astype(jnp.int32)
        hidden, _ = decoder(decoder.embed(tokens), positions, inside, most_segments=1)
        summed = einsum("btd,bt->bd", hidden.astype(jnp.float32), inside.astype(jnp.float32))
        return summed / lengths[:, None].astype(jnp.float32)

    out = np.zeros((len(texts), decoder.config.hidden_size), np.float32)
    order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
    while order:
        width = -(-len(texts[order[0]]) // _MULTIPLE) * _MULTIPLE
        rows = max(_TOKENS // width, 1)
        part, order = order[:rows], order[rows:]
        tokens, lengths = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
        for row, number in enumerate(part):
            lengths[row] = len(texts[number])
            tokens[row, : lengths[row]] = texts[number]
        out[part] = np.asarray(run(decoder, jnp.asarray(tokens), jnp.asarray(lengths)))[: len(part)]
    return out
