"""From a config to what every command works with: mesh, encoder, table, the sharded, partitioned model, its steps."""

import dataclasses
import enum
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from e2p_jax.backbone import weights
from e2p_jax.backbone.adapter import Adapter
from e2p_jax.backbone.attention import COMPILER_OPTIONS, choose
from e2p_jax.backbone.decoder import Decoder
from e2p_jax.backbone.families import DecoderConfig, read_config, say_ignored
from e2p_jax.backbone.layout import PLAIN, Execution
from e2p_jax.config import Config, TrainConfig
from e2p_jax.data.encode import Encoder, load_tokenizer
from e2p_jax.data.stops import named_stops
from e2p_jax.datasets.prepared import load_table
from e2p_jax.errors import UserError
from e2p_jax.parallel import distributed
from e2p_jax.parallel.mesh import make_mesh, param_sharding, replicated, row_sharding
from e2p_jax.prefix.items import Items
from e2p_jax.prefix.model import PrefixModel
from e2p_jax.prefix.projector import Projector
from e2p_jax.train.optimizer import make_optimizer, schedule
from e2p_jax.train.partition import path_name, split, trainable_mask
from e2p_jax.train.step import TrainState, make_eval_step, make_item_step, make_train_step
from e2p_jax.vectors.catalogue import Catalogue
from e2p_jax.vectors.population import Population
from e2p_jax.vectors.table import UserTable

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Inputs:
    """All that can be checked before any compilation."""

    config: Config
    directory: Path  # of the backbone
    decoder: DecoderConfig
    encoder: Encoder
    table: UserTable | None
    catalogue: Catalogue | None

    def published(self) -> tuple[str, str | None]:
        """Path and revision that other programs load the backbone by."""
        return weights.published(self.directory, self.config.backbone.path, self.config.backbone.revision)


def read_inputs(config: Config) -> Inputs:
    """Reads and checks everything but the weights; says on stderr what is doubtful.

    Raises:
      UserError: the config, backbone directory, tokenizer or table of user vectors is at fault.
    """
    config.validate()
    directory = weights.resolve(config.backbone.path, config.backbone.revision)
    decoder = read_config(directory, config.backbone.ignored_keys)
    if config.data.seq_len > decoder.max_positions:
        raise UserError(
            f"data.seq_len={config.data.seq_len} is beyond the backbone's {decoder.max_positions} positions; lower it"
        )
    tokenizer = load_tokenizer(directory, decoder.vocab_size)
    named = config.resolved().data.items
    catalogue = Catalogue.open(named) if named else None
    encoder = Encoder.from_config(config, tokenizer, decoder.vocab_size, named_stops(directory), catalogue)
    if distributed.is_first():
        said = say_ignored(directory, config.backbone.ignored_keys)
        for line in (*encoder.notes, *(f"warning: {warning}" for warning in (*said, *encoder.warnings))):
            print(line, file=sys.stderr)
    table = load_table(config.data.embeddings, config.data.missing_user) if config.data.embeddings else None
    return Inputs(config, directory, decoder, encoder, table, catalogue)


class Purpose(enum.IntEnum):
    """The purposes of `train.seed`: a key each. The order of rows is NumPy's (`data/pipeline.py`)."""

    PROJECTOR = 0
    ADAPTER = 1
    STEPS = 2  # each folds in its number; the projector splits what comes of it, the catalogue folds in 3
    ITEMS = 3

    def key(self, seed: int) -> jax.Array:
        return jax.random.fold_in(jax.random.key(seed), self.value)


@dataclasses.dataclass(frozen=True)
class Model:
    """A `PrefixModel` split once: static graph, parameters on the mesh, and the mask."""

    mesh: Mesh
    graph: nnx.GraphDef
    params: PyTree  # pure dict of arrays, or of their shapes; what trains in float32
    mask: PyTree  # pure dict of booleans
    fingerprint: str  # of the backbone's weights, "random" for random ones, "none" where there are only shapes
    compiler_options: dict[str, bool] = dataclasses.field(default_factory=dict)  # of the train step

    @property
    def merged(self) -> Any:
        """The `PrefixModel`, to be called, also with NumPy arrays."""
        return nnx.merge(self.graph, self.params)

    @property
    def embedding_width(self) -> int:
        """E, of a user vector."""
        return int(self.params["projector"]["input_mean"].shape[0])


def _memory(mesh: Mesh) -> int:
    """Bytes that programs get of a device, of whichever has least; 0 where nobody says, as on a CPU."""
    here = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in mesh.local_devices]
    return int(distributed.gather(np.array(min(here) >> 20, np.int32)).min()) << 20


def logits_at_once(config: TrainConfig, memory: int) -> int:
    """Float32 logits of the loss that a device holds, of whose memory programs get so many bytes; 0 is unknown.

    The head is read anew for each chunk of targets, so that a chunk should take longer to multiply than to read it.
    """
    return config.logits_at_once or (memory // 64 // 4 if memory else PLAIN.logits_at_once)


def abstract_model(
    config: Config,
    decoder: DecoderConfig,
    embedding_width: int,
    mesh: Mesh,
    memory: int | None = None,
    items: tuple[int, int] | None = None,
) -> Model:
    """The model that `build_model` fills in: shapes, dtypes and shardings in place of parameters.

    Args:
      memory: bytes that programs get of a device; None asks the devices.
      items: of a catalogue, how many, and the width of their vectors.

    Raises:
      UserError: `train.trainable` or `backbone.attention` does not fit.
    """
    device = mesh.devices.flat[0]
    dtype = weights.choose_dtype(config.backbone.dtype, device.platform)
    attention = choose(config.backbone.attention, device, decoder, dtype)
    at_once = logits_at_once(config.train, _memory(mesh) if memory is None else memory)
    # On a card, copies into and out of a loop's stacks are an eighth of a step. Gathered weights come and go in a loop.
    unroll = device.platform == "gpu" and not config.backbone.remat and mesh.shape["fsdp"] * mesh.shape["tensor"] == 1
    execution = Execution(config.backbone.remat, attention, logits_at_once=at_once, unroll=unroll)
    kind = config.backbone.quantization
    backbone = weights.abstract(decoder, dtype=dtype, execution=execution, quantization=kind)
    projector = nnx.eval_shape(lambda: _projector(config, decoder, embedding_width))
    adapted = config.adapter.kind != "none"
    adapter = nnx.eval_shape(lambda: _adapter(config, decoder)) if adapted else None
    head = items and nnx.eval_shape(lambda: _items(config, decoder, items))
    model = PrefixModel(backbone, projector, config.adapter.kind, adapter, head)
    named = config.train.trainable
    if items and not any(pattern.startswith(("items/", "**")) for pattern in named):
        named = (*named, "items/**")
    mask = trainable_mask(model, named)
    if kind != "none" and any(jax.tree.leaves(mask["backbone"])):
        raise UserError(
            f"train.trainable names weights of the backbone, and backbone.quantization={kind} freezes them; set one of "
            "the two to its default"
        )
    if decoder.num_experts and not any(jax.tree.leaves(mask["backbone"])):
        backbone.execution = dataclasses.replace(execution, sort_tokens=True)
    graph, state = nnx.split(model)

    def place(path: tuple, leaf: jax.ShapeDtypeStruct, trains: bool) -> jax.ShapeDtypeStruct:
        dtype = jnp.float32 if trains else leaf.dtype
        return leaf.update(dtype=dtype, sharding=param_sharding(mesh, path_name(path), leaf.shape))

    params = jax.tree_util.tree_map_with_path(place, nnx.to_pure_dict(state), mask)
    options = COMPILER_OPTIONS.get(execution.attention, {})
    return Model(mesh, graph, params, mask, "none", options)


def _projector(config: Config, decoder: DecoderConfig, embedding_width: int) -> Projector:
    return Projector(
        config.projector,
        embedding_width=embedding_width,
        model_width=decoder.hidden_size,
        null_user_rate=config.train.null_user_rate,
        rngs=nnx.Rngs(Purpose.PROJECTOR.key(config.train.seed)),
    )


def _items(config: Config, decoder: DecoderConfig, shape: tuple[int, int]) -> Items:
    items, given_width = shape
    return Items(
        config.items,
        items=items,
        given_width=given_width,
        model_width=decoder.hidden_size,
        rngs=nnx.Rngs(Purpose.ITEMS.key(config.train.seed)),
    )


def _adapter(config: Config, decoder: DecoderConfig) -> Adapter:
    return Adapter(decoder, config.adapter, rngs=nnx.Rngs(Purpose.ADAPTER.key(config.train.seed)))


class Shared:
    """Keeps the frozen backbone that was loaded last, for the next model in this process that stands on the same."""

    def __init__(self) -> None:
        self.kept: tuple[Any, PyTree, str] | None = None  # what tells it from others, parameters, fingerprint


def build_model(inputs: Inputs, population: Population, shared: Shared | None = None) -> Model:
    """Abstract init, shardings, weights straight into place, one jitted init of the projector.

    Args:
      population: of the training users; it sets the projector's statistics.
      shared: the backbone is taken from there, if it is the same one, or left there.

    Raises:
      UserError: the backbone's weights cannot be read or `train.trainable` does not fit.
    """
    config, width = inputs.config, len(population.mean)
    model = abstract_model(config, inputs.decoder, width, make_mesh(config.mesh), items=_shape(inputs.catalogue))
    backbone, fingerprint = _backbone(inputs, model, lambda path: True, shared)

    def initialise(embedding: jax.Array, mean: jax.Array, std: jax.Array) -> PyTree:
        projector = _projector(config, inputs.decoder, width)
        projector.calibrate(mean, std, embedding, config.projector.init_scale * inputs.decoder.embedding_scale)
        return _pure(projector)

    with jax.set_mesh(model.mesh):
        projector = jax.jit(initialise, out_shardings=replicated(model.mesh))(backbone["embedding"], *population)
    params = {"backbone": backbone, "projector": projector, **_others(inputs, model, lambda path: True)}
    params = jax.tree.map(lambda value, shape: value.astype(shape.dtype), params, model.params)
    return dataclasses.replace(model, params=params, fingerprint=fingerprint)


Parts = Literal["none", "embedding", "all"]  # of a frozen backbone


def frozen_model(inputs: Inputs, embedding_width: int, parts: Parts, shared: Shared | None = None) -> Model:
    """The model with what its run's checkpoints do not hold: the frozen parameters of the backbone and of adapters.

    Args:
      parts: what of them is there: nothing, the token embeddings alone, or all. In place of the rest are the shapes.
      shared: as `build_model` has it; with all parts.

    Raises:
      UserError: the backbone's weights cannot be read or `train.trainable` does not fit.
    """
    mesh, items = make_mesh(inputs.config.mesh), _shape(inputs.catalogue)
    model = abstract_model(inputs.config, inputs.decoder, embedding_width, mesh, items=items)
    trained = {path_name(path) for path, trains in jax.tree_util.tree_leaves_with_path(model.mask) if trains}

    def wanted(path: str) -> bool:
        here = parts == "all" or path.startswith("items/") or (parts == "embedding" and path == "backbone/embedding")
        return here and path not in trained

    backbone, fingerprint = _backbone(inputs, model, wanted, shared)
    params = model.params | {"backbone": backbone, **_others(inputs, model, wanted)}
    return dataclasses.replace(model, params=params, fingerprint=fingerprint)


def _shape(catalogue: Catalogue | None) -> tuple[int, int] | None:
    """Items that training knew, and the width of their vectors."""
    return None if catalogue is None else (catalogue.known, catalogue.table.width)


def _others(inputs: Inputs, model: Model, wanted: Callable[[str], bool]) -> dict[str, PyTree]:
    """Adapters and catalogue, where there are such, by the first part of their paths."""
    config, kind, out = inputs.config, inputs.config.adapter.kind, {}
    if kind in model.params:
        out[kind] = _initialised(lambda: _pure(_adapter(config, inputs.decoder)), model, kind, wanted)
    if inputs.catalogue is not None and (shape := _shape(inputs.catalogue)):
        head = _initialised(
            lambda: _pure(_items(config, inputs.decoder, shape)),
            model,
            "items",
            lambda path: path != "items/given" and wanted(path),
        )
        out["items"] = head | {"given": place(inputs.catalogue.given()[: shape[0]], head["given"].sharding)}
    return out


def _pure(module: nnx.Module) -> PyTree:
    return nnx.to_pure_dict(nnx.state(module))


def place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def with_later_items(model: Model, catalogue: Catalogue | None) -> Model:
    """The model with the items that training did not know; their learned vectors are zero."""
    if catalogue is None or catalogue.known == len(catalogue):
        return model

    def grown(learned: jax.Array) -> jax.Array:
        return jnp.pad(learned, ((0, len(catalogue) - catalogue.known), (0, 0)))

    head, given = model.params["items"], catalogue.given()
    head = head | {"given": place(given, param_sharding(model.mesh, "items/given", given.shape))}
    for name in head.keys() & {"learned", "said"}:
        sharding = param_sharding(model.mesh, f"items/{name}", (len(catalogue), head[name].shape[1]))
        head[name] = jax.jit(grown, out_shardings=sharding)(head[name])
    return dataclasses.replace(model, params={**model.params, "items": head})


def _initialised(make: Callable[[], PyTree], model: Model, part: str, wanted: Callable[[str], bool]) -> PyTree:
    """Makes a part of the abstract `model` in its place by `make`; the shapes of what is not wanted."""
    shapes = model.params[part]

    def chosen(values: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda path, value: value if wanted(f"{part}/{path_name(path)}") else None, values
        )

    places = chosen(_places(shapes))
    made = jax.jit(lambda: chosen(make()), out_shardings=places)()
    return jax.tree.map(lambda shape, value: shape if value is None else value, shapes, made)


def _backbone(inputs: Inputs, model: Model, wanted: Callable[[str], bool], shared: Shared | None) -> tuple[PyTree, str]:
    """Its wanted parameters in the places that the abstract `model` names, shapes for the rest; the fingerprint."""
    if shared is None:
        return _load_backbone(inputs, model, wanted)
    if inputs.config.backbone.weights == "random" or any(jax.tree.leaves(model.mask["backbone"])):
        shared.kept = None  # room for one that trains
        return _load_backbone(inputs, model, wanted)
    leaves, tree = jax.tree.flatten(model.params["backbone"])
    key = inputs.directory, inputs.decoder, tree, [(leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves]
    if shared.kept is not None and shared.kept[0] == key:
        _, params, fingerprint = shared.kept
        if weights.open_checkpoint(inputs.directory).fingerprint() == fingerprint:
            return params, fingerprint
    shared.kept = None
    params, fingerprint = _load_backbone(inputs, model, wanted)
    shared.kept = key, params, fingerprint
    return params, fingerprint


def _load_backbone(inputs: Inputs, model: Model, wanted: Callable[[str], bool]) -> tuple[PyTree, str]:
    config = inputs.config.backbone
    dtype = weights.choose_dtype(config.dtype, model.mesh.devices.flat[0].platform)
    if config.weights == "pretrained":
        sharding = functools.partial(param_sharding, model.mesh)
        decoder = weights.load(
            inputs.directory,
            dtype=dtype,
            sharding=sharding,
            quantization=config.quantization,
            wanted=lambda path: wanted(f"backbone/{path}"),
            ignored_keys=config.ignored_keys,
        )
        loaded = jax.tree.map(
            lambda shape, value: value if isinstance(value, jax.Array) else shape,
            model.params["backbone"],
            nnx.to_pure_dict(nnx.state(decoder)),
        )
        return loaded, weights.open_checkpoint(inputs.directory).fingerprint()

    def initialise() -> PyTree:
        # Of the next seed, and no purpose of this one: what stays frozen of it is in no checkpoint, and made anew.
        rngs = nnx.Rngs(inputs.config.train.seed + 1)
        return _pure(Decoder(inputs.decoder, dtype=dtype, rngs=rngs))

    return _initialised(initialise, model, "backbone", wanted), "random"


def _places(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def state_shardings(model: Model, state: PyTree) -> PyTree:
    """Optimizer moments lie where their parameters lie: the path inside the state ends with the parameter's."""

    def sharding(path: tuple, leaf: Any) -> jax.sharding.Sharding:
        name = path_name(path)
        cuts = [name.find(f"{part}/") for part in model.params]
        start = min((cut for cut in cuts if cut >= 0), default=-1)
        return replicated(model.mesh) if start < 0 else param_sharding(model.mesh, name[start:], leaf.shape)

    return jax.tree_util.tree_map_with_path(sharding, state)


def abstract_state(model: Model, config: TrainConfig) -> TrainState:
    """Gives the shapes, dtypes and shardings of what `initial_state` makes, of a model with or without values."""
    trainable, _ = split(model.params, model.mask)
    state = jax.eval_shape(functools.partial(_fresh_state, model, config), trainable)
    return jax.tree.map(lambda leaf, place: leaf.update(sharding=place), state, state_shardings(model, state))


def _fresh_state(model: Model, config: TrainConfig, trainable: PyTree) -> TrainState:
    optimizer = make_optimizer(config, model.mask, model.params)
    key = Purpose.STEPS.key(config.seed)
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), key)


def initial_state(model: Model, config: TrainConfig) -> tuple[TrainState, PyTree]:
    """A fresh state on the mesh, and the frozen parameters."""
    trainable, frozen = split(model.params, model.mask)
    places = _places(abstract_state(model, config))
    return jax.jit(functools.partial(_fresh_state, model, config), out_shardings=places)(trainable), frozen


def jit_train_step(model: Model, config: TrainConfig) -> jax.stages.Wrapped:
    """(state, frozen, batch) -> (state, metrics) of arrays in their places, where the new state is written over the
    old one. Lowered and compiled it is one program, which takes nothing that lies elsewhere.
    """
    optimizer, rate = make_optimizer(config, model.mask, model.params), schedule(config)
    step = make_train_step(model.graph, model.mask, optimizer, rate, config.accumulation)
    state, (_, frozen) = _places(abstract_state(model, config)), _places(split(model.params, model.mask))
    return jax.jit(
        step,
        in_shardings=(state, frozen, row_sharding(model.mesh)),
        out_shardings=(state, replicated(model.mesh)),
        donate_argnums=0,
        compiler_options=model.compiler_options,
    )


def jit_eval_step(model: Model, max_traces: int | None = None, items: str = "") -> Callable[..., Any]:
    """(trainable, frozen, batch) -> [B, S], the same on every device; more than `max_traces` traces are an error.

    Args:
      items: what of the head over the catalogue is worked out in place of the text's NLL (`make_item_step`).
    """
    graph, mask = model.graph, model.mask
    step = make_item_step(graph, mask, items) if items else make_eval_step(graph, mask)
    step = chex.assert_max_traces(step, n=max_traces) if max_traces else step
    places = (*_places(split(model.params, model.mask)), row_sharding(model.mesh))
    return jax.jit(step, in_shardings=places, out_shardings=replicated(model.mesh))
