"""Generation with a key-value cache: several users a batch, greedy or sampled."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from e2p_jax.backbone.decoder import Cache
from e2p_jax.config import Condition
from e2p_jax.data.conditions import FRONTS, spelled_out
from e2p_jax.data.encode import Encoder, Example
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError, shown
from e2p_jax.files import existing
from e2p_jax.options import Sampling
from e2p_jax.parallel.mesh import on_all, row_shards
from e2p_jax.prefix.model import PrefixModel
from e2p_jax.train.run import Run
from e2p_jax.vectors.arrays import map_array

SHORTEST_PROMPT = 64
_OPENING = 16  # tokens, or a multiple


class Draws(NamedTuple):
    """How tokens are drawn, as arrays: another value compiles nothing anew."""

    seed: np.uint32
    temperature: np.float32
    top_p: np.float32

    @classmethod
    def of(cls, sampling: Sampling) -> "Draws":
        return cls(np.uint32(sampling.seed), np.float32(sampling.temperature), np.float32(sampling.top_p))


def choose(logits: jax.Array, key: jax.Array, draws: Draws, top_k: int) -> jax.Array:
    """[B, V] float32 logits -> [B] int32 tokens; `draws.seed` stands in the key already."""

    def likeliest(logits: jax.Array) -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn(logits: jax.Array) -> jax.Array:
        logits = logits / draws.temperature
        if top_k:
            kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
            logits = jnp.where(logits >= kth, logits, -jnp.inf)
        logits = jax.lax.cond(draws.top_p < 1, nucleus, lambda logits: logits, logits)
        return jax.random.categorical(key, logits).astype(jnp.int32)

    def nucleus(logits: jax.Array) -> jax.Array:
        ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        least = jnp.min(jnp.where(before < draws.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(logits >= least, logits, -jnp.inf)

    return jax.lax.cond(draws.temperature == 0, likeliest, drawn, logits)


class Reply(NamedTuple):
    """What is said, and the id of the item in front of it, if one stands there."""

    text: str
    item: str | None


class Decoding(NamedTuple):
    """A batch of replies under way."""

    step: jax.Array  # [] int32, of the last token chosen
    token: jax.Array  # [B] int32, chosen there; the pad id where the reply had ended
    done: jax.Array  # [B] bool: this token or one before it is a stop
    lengths: jax.Array  # [B] int32, of the prompts, slots included
    items: jax.Array  # [B] int32, that stand in front of the replies; -1 where none does
    cache: Cache


_STATIC = ("graph", "top_k", "stops", "pad")


def _start(
    params: Any,
    tokens: jax.Array,  # [B, P] int32, left-padded
    segment_ids: jax.Array,  # [B, P] int32, 0 at the padding
    slots: jax.Array,  # [B, P] int32
    user_embeddings: jax.Array,  # [B, 1, E] float32
    draws: Draws,
    *,
    graph: nnx.GraphDef,
    new_tokens: int,
    top_k: int,
    stops: tuple[int, ...],
    pad: int,
) -> Decoding:
    """Reads the prompts, chooses the item in front of each reply, where there is one, and its first token."""
    model = nnx.merge(graph, params)
    batch, prompt = tokens.shape
    cache = model.backbone.empty_cache(batch, prompt + new_tokens + model.says_items)
    positions = jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
    x = model.embed(tokens, slots, user_embeddings)
    hidden, cache = model.hidden(x, positions, segment_ids, cache)
    step, none = jnp.zeros((), jnp.int32), jnp.zeros((batch,), bool)
    lengths, items = jnp.sum(segment_ids, axis=1), jnp.full((batch,), -1, jnp.int32)
    if model.says_items:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(draws.seed), step), 1)  # of no token
        items = on_all(choose(model.item_logits(hidden[:, -1:])[:, 0], key, draws, top_k))
        x = model.item_tokens(items[:, None]).astype(x.dtype)
        hidden, cache = model.hidden(x, lengths[:, None], jnp.ones_like(lengths)[:, None], cache)
        lengths = lengths + 1
    token, done = _pick(model, hidden, step, none, draws, top_k, stops, pad)
    return Decoding(step, token, done, lengths, items, cache)


def _advance(
    params: Any,
    state: Decoding,
    draws: Draws,
    *,
    graph: nnx.GraphDef,
    top_k: int,
    stops: tuple[int, ...],
    pad: int,
) -> Decoding:
    """Chooses one more token of each reply."""
    model = nnx.merge(graph, params)
    x = model.backbone.embed(state.token[:, None])
    positions = (state.lengths + state.step)[:, None]
    hidden, cache = model.hidden(x, positions, jnp.ones_like(positions), state.cache)
    token, done = _pick(model, hidden, state.step + 1, state.done, draws, top_k, stops, pad)
    return Decoding(state.step + 1, token, done, state.lengths, state.items, cache)


def _pick(
    model: PrefixModel,
    hidden: jax.Array,  # [B, T, D]
    step: jax.Array,
    done: jax.Array,
    draws: Draws,
    top_k: int,
    stops: tuple[int, ...],
    pad: int,
) -> tuple[jax.Array, jax.Array]:
    key = jax.random.fold_in(jax.random.key(draws.seed), step)
    token = jnp.where(done, pad, choose(model.backbone.logits(hidden[:, -1]), key, draws, top_k))
    stopped = functools.reduce(jnp.logical_or, [token == stop for stop in stops], jnp.zeros_like(done))
    return on_all(token), on_all(done | stopped)


def _opened(state: Decoding, opening: jax.Array | None) -> Decoding:
    """With the token that the reply opens with in place of the one that was chosen, where `opening` has one.

    Args:
      opening: [B, L] int32, -1 behind a reply's.
    """
    if opening is None:
        return state
    given = opening[:, jnp.minimum(state.step, opening.shape[1] - 1)]
    is_given = (given >= 0) & (state.step < opening.shape[1])
    return state._replace(token=jnp.where(is_given, given, state.token), done=state.done & ~is_given)


def _finish(
    params: Any,
    state: Decoding,
    draws: Draws,
    opening: jax.Array | None = None,
    *,
    new_tokens: int,
    pad: int,
    **static: Any,
) -> tuple[Decoding, jax.Array]:
    """The last state; [B, N] int32: the new tokens, the stopping one included, `pad` after it. All on the device."""

    def body(carry: tuple[Decoding, jax.Array]) -> tuple[Decoding, jax.Array]:
        state, out = carry
        state = _opened(_advance(params, state, draws, pad=pad, **static), opening)
        return state, out.at[:, state.step].set(state.token)

    def unfinished(carry: tuple[Decoding, jax.Array]) -> jax.Array:
        return (carry[0].step + 1 < new_tokens) & ~jnp.all(carry[0].done)

    state = _opened(state, opening)
    out = jnp.full((len(state.token), new_tokens), pad, jnp.int32).at[:, 0].set(state.token)
    return jax.lax.while_loop(unfinished, body, (state, out))


@functools.partial(jax.jit, static_argnames=(*_STATIC, "new_tokens"))
def _decode(params: Any, *inputs: Any, **static: Any) -> tuple[jax.Array, jax.Array]:
    """[B, N] int32: as `_finish`; [B] int32: the items in front of the tokens, -1 where there is none."""
    state = _start(params, *inputs, **static)
    return _finish(params, state, inputs[-1], **static)[1], state.items


_start_once = jax.jit(_start, static_argnames=(*_STATIC, "new_tokens"))
_advance_once = jax.jit(_advance, static_argnames=_STATIC, donate_argnames="state")
_finish_once = jax.jit(_finish, static_argnames=(*_STATIC, "new_tokens"), donate_argnames="state")


def padded_length(longest: int, shortest: int = SHORTEST_PROMPT) -> int:
    """Two lengths an octave (64, 128, 192, 256, 384, 512, 768, ...), so that few are ever compiled.

    Slots come on top: a prompt with a soft token must not fall into the next length for it.
    """
    step = max(shortest, 1 << max(0, (longest - 1).bit_length() - 2))
    return -(-max(longest, 1) // step) * step


def _left_padded(
    prompts: Sequence[Example], vectors: np.ndarray, pad: int, num_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pads B prompts on the left: what `_start` reads after the parameters.

    The last is repeated until the rows divide by the devices that they are spread over.
    """
    in_slots = num_tokens if any(len(prompt.slot_starts) for prompt in prompts) else 0
    length = padded_length(max(len(prompt.tokens) for prompt in prompts) - in_slots) + in_slots
    more = -len(prompts) % row_shards()
    prompts, vectors = [*prompts, *[prompts[-1]] * more], np.concatenate([vectors, *[vectors[-1:]] * more])
    tokens = np.full((len(prompts), length), pad, np.int32)
    segments = np.zeros_like(tokens)
    slots = np.full_like(tokens, -1)
    for row, prompt in enumerate(prompts):
        first = length - len(prompt.tokens)
        tokens[row, first:] = prompt.tokens
        segments[row, first:] = 1
        slots[row, first + prompt.slot_places(num_tokens)] = np.arange(num_tokens)[None]
    return tokens, segments, slots, vectors[:, None]


def generate_tokens(
    graph: nnx.GraphDef,
    params: Any,
    prompts: Sequence[Example],
    vectors: np.ndarray,
    *,
    sampling: Sampling,
    stops: tuple[int, ...],
    pad: int,
    num_tokens: int,
    openings: Callable[[Sequence[int]], np.ndarray] | None = None,
) -> tuple[list[list[int]], list[int]]:
    """Continues each prompt until a stop token or `sampling.max_new_tokens`.

    Args:
      prompts: B prompts, slots included.
      vectors: [B, E] float32; read where the prompt has slots.
      num_tokens: K.
      openings: the rows of the items in front of R replies, R at least B -> [R, L] int32, the tokens that they open
        with, -1 behind them.

    Returns:
      The new tokens of each, without the stop token; the row of the item in front of each, -1 where there is none.

    Raises:
      UserError: prompt and reply do not fit the backbone's positions.
    """
    inputs, draws = _left_padded(prompts, vectors, pad, num_tokens), Draws.of(sampling)
    static: dict[str, Any] = {"graph": graph, "top_k": sampling.top_k, "stops": stops, "pad": pad}
    static["new_tokens"] = sampling.max_new_tokens
    if openings is None:
        out, items = _decode(params, *inputs, draws, **static)
    else:
        state = _start_once(params, *inputs, draws, **static)
        items = np.array(state.items)  # a copy: the state is given away
        _, out = _finish_once(params, state, draws, openings(items.tolist()), **static)
    replies = []
    for row in np.asarray(out)[: len(prompts)].tolist():
        end = next((i for i, token in enumerate(row) if token in stops), len(row))
        replies.append(row[:end])
    return replies, np.asarray(items)[: len(prompts)].tolist()


def generate(
    run: Run, records: Sequence[Record], vectors: np.ndarray, condition: Condition, sampling: Sampling, batch: int = 16
) -> list[str]:
    """The texts of `reply`."""
    return [each.text for each in reply(run, records, vectors, condition, sampling, batch)]


def reply(
    run: Run, records: Sequence[Record], vectors: np.ndarray, condition: Condition, sampling: Sampling, batch: int = 16
) -> list[Reply]:
    """The assistant's next turn of every record.

    Args:
      records: conversations that end with a user turn.
      vectors: [N, E] float32, one per record.

    Returns:
      N of them.

    Raises:
      UserError: a prompt too long for the backbone.
    """
    encoder: Encoder = run.inputs.encoder
    records = list(spelled_out(records, condition))
    prompts = _encode(run, records, [condition] * len(records), sampling)
    replies: list[Reply] = []
    size = min(batch, len(prompts))
    for first in range(0, len(prompts), batch):
        part = [min(n, len(prompts) - 1) for n in range(first, first + size)]  # one size, one compilation
        with jax.set_mesh(run.model.mesh):
            tokens, items = generate_tokens(
                run.model.graph,
                run.model.params,
                [prompts[n] for n in part],
                vectors[part],
                sampling=sampling,
                stops=encoder.stops,
                pad=encoder.pad_id,
                num_tokens=encoder.num_tokens,
                openings=_titles(run, len(part)),
            )
        texts = [str(encoder.tokenizer.decode(each, skip_special_tokens=True)).strip() for each in tokens]
        catalogue = run.inputs.catalogue
        names = catalogue.table.index.ids(items) if catalogue and encoder.item_token else [None] * len(items)
        replies += map(Reply, texts, names)
    return replies[: len(prompts)]


def stream(
    run: Run, records: Sequence[Record], vectors: np.ndarray, conditions: Sequence[Condition], sampling: Sampling
) -> Iterator[list[str]]:
    """The replies as they grow: what `generate` says, one token after the other, all records in one batch.

    Args:
      records: N conversations that end with a user turn.
      vectors: [N, E] float32, one per record.
      conditions: N, one per record.

    Yields:
      N texts, each no shorter than before; the last are the whole replies.

    Raises:
      UserError: a prompt too long for the backbone.
    """
    encoder: Encoder = run.inputs.encoder
    encoded = _encode(run, records, conditions, sampling)
    static: dict[str, Any] = {"graph": run.model.graph, "top_k": sampling.top_k}
    static |= {"stops": encoder.stops, "pad": encoder.pad_id}
    draws = Draws.of(sampling)
    with jax.set_mesh(run.model.mesh):
        prompts = _left_padded(encoded, vectors, encoder.pad_id, encoder.num_tokens)
        state = _start_once(run.model.params, *prompts, draws, new_tokens=sampling.max_new_tokens, **static)
        titles = _titles(run, len(records))
        opening = None if titles is None else jnp.asarray(titles(np.asarray(state.items).tolist()))
        state = _opened(state, opening)
    replies: list[list[int]] = [[] for _ in records]
    for left in reversed(range(sampling.max_new_tokens)):
        token, done = jax.device_get((state.token, state.done))
        for reply, new, is_last in zip(replies, token.tolist(), done.tolist(), strict=False):  # rows may be more
            if not is_last:
                reply.append(new)
        yield [str(encoder.tokenizer.decode(reply, skip_special_tokens=True)).strip() for reply in replies]
        if done.all() or not left:
            return
        with jax.set_mesh(run.model.mesh):
            state = _opened(_advance_once(run.model.params, state, draws, **static), opening)


def _titles(run: Run, count: int) -> Callable[[Sequence[int]], np.ndarray] | None:
    """What so many replies open with where the log names the items in front of them: their titles, as in training."""
    opening, catalogue = run.opening, run.inputs.catalogue
    if opening is None or catalogue is None:
        return None

    def openings(items: Sequence[int]) -> np.ndarray:
        rows = list(map(opening, catalogue.table.index.ids(list(items[:count]))))
        wide = max(-(-max(map(len, rows)) // _OPENING), 1) * _OPENING
        rows += [rows[-1]] * (len(items) - len(rows))  # those that fill up the devices
        return np.array([row + [-1] * (wide - len(row)) for row in rows], np.int32)

    return openings


def _encode(run: Run, records: Sequence[Record], conditions: Sequence[Condition], sampling: Sampling) -> list[Example]:
    """The prompts, each short enough for its reply."""
    limit = run.inputs.decoder.max_positions
    prompts = [run.inputs.encoder.encode_prompt(record, c) for record, c in zip(records, conditions, strict=True)]
    for record, prompt in zip(records, prompts, strict=True):
        if len(prompt.tokens) + run.inputs.encoder.item_token + sampling.max_new_tokens > limit:
            raise UserError(
                f"{record.source}: {len(prompt.tokens)} prompt tokens and --max-new-tokens {sampling.max_new_tokens} "
                f"are beyond the backbone's {limit} positions"
            )
    return prompts


def vectors_for(run: Run, users: Sequence[str], where: Sequence[str], condition: Condition) -> np.ndarray:
    """[N, E] float32: what the condition gives each user, its own vector from the run's table.

    Args:
      users: N ids, whatever they begin with.
      where: for errors, the record or flag that each stands in.

    Raises:
      UserError: no vector.
    """
    if where and FRONTS[condition].vector == "own" and run.inputs.table is None:
        raise UserError(f"{where[0]}: the run names no table of user vectors; give --embeddings TABLE")
    records = [Record(user, (), (), source=place) for user, place in zip(users, where, strict=True)]
    return run.vectors(records, condition).gather()


def asked_for(run: Run, flags: Sequence[str], condition: Condition = "e2p") -> tuple[list[str], np.ndarray]:
    """Reads what `--user` names: the id of a user; `@vector.npy`, a file; `@@alice`, the user `@alice`.

    Returns:
      N names, those of files as they were given, and what the condition gives them, [N, E] float32.

    Raises:
      UserError: no vector, or one of the wrong width.
    """
    names = [flag[1:] if flag.startswith("@@") else flag for flag in flags]
    in_files = [FRONTS[condition].vector == "own" and flag[:1] == "@" and flag[:2] != "@@" for flag in flags]
    width = run.model.embedding_width
    vectors = np.zeros((len(flags), width), np.float32)
    for row, flag in enumerate(flags):
        if in_files[row]:
            vectors[row] = _read_vector(flag, width)
    if rows := [row for row, in_file in enumerate(in_files) if not in_file]:
        users, where = [names[row] for row in rows], [f"--user {flags[row]}" for row in rows]
        vectors[rows] = vectors_for(run, users, where, condition)
    return names, vectors


def _read_vector(flag: str, width: int) -> np.ndarray:
    """The vector of `@vector.npy`."""
    remedy = f"the user {shown(flag)} is written {shown('@' + flag)}"
    path = existing(flag[1:], f"--user {shown(flag)} ({remedy})", only_file=True)
    array = map_array(path)
    if array.dtype.kind in "iuf" and array.size == width:
        with np.errstate(over="ignore"):
            vector = array.astype(np.float32).reshape(-1)
        if np.isfinite(vector).all():
            return vector
    raise UserError(f"{path}: needs {width} finite numbers, has shape {array.shape} of {array.dtype}")
