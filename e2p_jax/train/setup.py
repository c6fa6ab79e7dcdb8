"""From a config to what every command works with: mesh, encoder, table, and the sharded, partitioned model."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from e2p_jax.backbone import weights
from e2p_jax.backbone.decoder import Decoder
from e2p_jax.backbone.families import DecoderConfig, read_config
from e2p_jax.config import BackboneConfig, Config, TrainConfig
from e2p_jax.data.embeddings import UserTable, load_table
from e2p_jax.data.encode import Encoder, load_tokenizer
from e2p_jax.errors import UserError
from e2p_jax.parallel.mesh import make_mesh, param_sharding, replicated
from e2p_jax.prefix.model import PrefixModel
from e2p_jax.prefix.projector import Projector
from e2p_jax.train.optimizer import make_optimizer
from e2p_jax.train.partition import path_name, split, trainable_mask
from e2p_jax.train.step import TrainState

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What can be checked before any compilation."""

    config: Config
    directory: Path  # of the backbone
    decoder: DecoderConfig
    encoder: Encoder
    table: UserTable | None


def read_inputs(config: Config) -> Inputs:
    """Reads and checks everything but the weights.

    Raises:
      UserError: the config, backbone directory, tokenizer or table of user vectors is at fault.
    """
    config.validate()
    directory = weights.resolve(config.backbone.path, config.backbone.revision)
    decoder = read_config(directory)
    if config.data.seq_len > decoder.max_positions:
        raise UserError(
            f"data.seq_len={config.data.seq_len} is beyond the backbone's {decoder.max_positions} positions; lower it"
        )
    encoder = Encoder.from_config(config, load_tokenizer(directory, decoder.vocab_size))
    table = load_table(config.data.embeddings) if config.data.embeddings else None
    return Inputs(config, directory, decoder, encoder, table)


@dataclasses.dataclass(frozen=True)
class Model:
    """A `PrefixModel` split once: static graph, parameters on the mesh, and the mask."""

    mesh: Mesh
    graph: nnx.GraphDef
    params: PyTree  # pure dict of arrays
    mask: PyTree  # pure dict of booleans
    fingerprint: str  # of the backbone's weights, "random" for random ones


def build_model(inputs: Inputs, training_vectors: np.ndarray) -> Model:
    """Abstract init, shardings, weights straight into place, one jitted init of the projector.

    Args:
      training_vectors: [N, E] float32, one per training user; they set the projector's statistics.

    Raises:
      UserError: the backbone's weights cannot be read or `train.trainable` does not fit.
    """
    config, mesh = inputs.config, make_mesh(inputs.config.mesh)
    decoder, fingerprint = _backbone(config.backbone, inputs, mesh)

    def make_projector() -> Projector:
        return Projector(
            embedding_width=training_vectors.shape[1],
            model_width=inputs.decoder.hidden_size,
            num_tokens=config.projector.num_tokens,
            kind=config.projector.kind,
            hidden_size=config.projector.hidden_size,
            dropout=config.projector.dropout,
            rngs=nnx.Rngs(config.train.seed),
        )

    def initialise(embedding: jax.Array, vectors: jax.Array) -> nnx.State:
        projector = make_projector()
        projector.calibrate(vectors, embedding, config.projector.init_scale * inputs.decoder.embedding_scale)
        return nnx.state(projector)

    projector = nnx.eval_shape(make_projector)
    with jax.set_mesh(mesh):
        state = jax.jit(initialise, out_shardings=replicated(mesh))(decoder.embedding[...], training_vectors)
    nnx.update(projector, state)
    model = PrefixModel(decoder, projector)
    mask = trainable_mask(model, config.train.trainable)
    graph, state = nnx.split(model)
    return Model(mesh, graph, nnx.to_pure_dict(state), mask, fingerprint)


def _backbone(config: BackboneConfig, inputs: Inputs, mesh: Mesh) -> tuple[Decoder, str]:
    dtype = weights.choose_dtype(config.dtype)
    sharding = functools.partial(param_sharding, mesh)
    if config.weights == "pretrained":
        fingerprint = weights.Checkpoint(inputs.directory).fingerprint()
        return weights.load(inputs.directory, dtype=dtype, remat=config.remat, sharding=sharding), fingerprint
    decoder = weights.abstract(inputs.decoder, dtype=dtype, remat=config.remat)
    state = nnx.state(decoder)
    flat = nnx.to_flat_state(state)
    shardings = nnx.from_flat_state(
        [(path, v.replace(sharding("backbone/" + "/".join(map(str, path)), v.get_value().shape))) for path, v in flat]
    )

    def initialise() -> nnx.State:
        rngs = nnx.Rngs(inputs.config.train.seed + 1)
        return nnx.state(Decoder(inputs.decoder, dtype=dtype, remat=config.remat, rngs=rngs))

    nnx.update(decoder, jax.jit(initialise, out_shardings=shardings)())
    return decoder, "random"


def state_shardings(model: Model, state: PyTree) -> PyTree:
    """Optimizer moments lie where their parameters lie: the path inside the state ends with the parameter's."""

    def sharding(path: tuple, leaf: Any) -> jax.sharding.Sharding:
        name = path_name(path)
        cuts = [name.find(part) for part in ("backbone/", "projector/")]
        start = min((cut for cut in cuts if cut >= 0), default=-1)
        return replicated(model.mesh) if start < 0 else param_sharding(model.mesh, name[start:], leaf.shape)

    return jax.tree_util.tree_map_with_path(sharding, state)


def initial_state(model: Model, config: TrainConfig) -> tuple[TrainState, PyTree]:
    """A fresh state on the mesh, and the frozen parameters."""
    trainable, frozen = split(model.params, model.mask)
    optimizer = make_optimizer(config, model.mask)

    def build(trainable: PyTree) -> TrainState:
        key = jax.random.key(config.seed)
        return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), key)

    shardings = state_shardings(model, jax.eval_shape(build, trainable))
    return jax.jit(build, out_shardings=shardings)(trainable), frozen
