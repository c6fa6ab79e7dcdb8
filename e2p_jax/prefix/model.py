"""The method: a frozen decoder with projected user vectors at its slots."""

from typing import NotRequired, TypedDict

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from e2p_jax.backbone.adapter import Adapter, by_matrix
from e2p_jax.backbone.decoder import Cache, Decoder
from e2p_jax.prefix.items import Items
from e2p_jax.prefix.loss import cross_entropy
from e2p_jax.prefix.places import at_places
from e2p_jax.prefix.projector import Projector
from e2p_jax.products import einsum


class Batch(TypedDict):
    """One batch: B rows of T tokens, S segments, M targets; E is the user vectors' width.

    Those of items are there where records name some of a catalogue, `longest` where no segment may fill a row.
    """

    tokens: jax.Array  # [B, T] int32
    positions: jax.Array  # [B, T] int32
    segment_ids: jax.Array  # [B, T] int32, 0 is padding
    slots: jax.Array  # [B, T] int32 into the row's S*K soft tokens and, behind them, S items; -1 where none
    user_embeddings: jax.Array  # [B, S, E] float32
    target_positions: jax.Array  # [B, M] int32
    target_ids: jax.Array  # [B, M] int32
    target_weights: jax.Array  # [B, M] float32
    item_positions: NotRequired[jax.Array]  # [B, S] int32: where the first token of the segment's reply is predicted
    item_ids: NotRequired[jax.Array]  # [B, S, N] int32, distinct rows of the catalogue, -1 where there is none
    longest: NotRequired[jax.Array]  # [B, L] int8, of which nothing but L is read: no segment is longer


class PrefixModel(nnx.Module):
    """Backbone, projector, perhaps adapters and a catalogue; parameter paths begin with `backbone/`, `projector/`, the
    kind and `items/`.
    """

    def __init__(
        self,
        backbone: Decoder,
        projector: Projector,
        kind: str = "none",
        adapter: Adapter | None = None,
        items: Items | None = None,
    ):
        self.backbone, self.projector, self.kind = backbone, projector, kind
        if items is not None:
            self.items = items
        if adapter is not None:
            setattr(self, kind, adapter)

    def embed(
        self,
        tokens: jax.Array,
        slots: jax.Array,
        user_embeddings: jax.Array,
        dropout_key: jax.Array | None = None,
        items: jax.Array | None = None,
    ) -> jax.Array:
        """Token embeddings with the soft tokens in their slots.

        Args:
          tokens: [B, T] int32.
          slots: [B, T] int32 into the row's S*K soft tokens and, behind them, S items; -1 where there is none.
          user_embeddings: [B, S, E] float32.
          dropout_key: turns the projector's dropout on.
          items: [B, S] int32, whose tokens stand in slots.

        Returns:
          [B, T, D] in the backbone's dtype: what transformers takes as `inputs_embeds`. A family that scales token
          embeddings (Gemma) does so before, and a soft token stands there as it is; one that scales all that it is
          given (Granite) does so after.
        """
        x = self.backbone.embed(tokens)
        soft = self.projector(user_embeddings, dropout_key)  # [B, S, K, D]
        batch, segments, count, width = soft.shape
        soft = soft.reshape(batch, segments * count, width)
        if items is not None:
            soft = jnp.concatenate([soft, self.item_tokens(items)], axis=1)
        soft = soft.astype(x.dtype)
        at_slots = jnp.take_along_axis(soft, jnp.maximum(slots, 0)[..., None], axis=1)
        return jnp.where(slots[..., None] >= 0, at_slots, x)

    @property
    def says_items(self) -> bool:
        """Whether an item stands in front of the reply."""
        return hasattr(self, "items") and self.items.settings.token

    def item_logits(self, hidden: jax.Array) -> jax.Array:
        """States [B, S, D] that replies are predicted from -> [B, S, I] float32, of the items as the answer."""
        return einsum("bsr,ir->bsi", self.items.queries(self.backbone.before_head(hidden)), self.items.rows())

    def item_tokens(self, items: jax.Array) -> jax.Array:
        """[B, S] int32 -> [B, S, D] float32: what stands for an item in front of a reply."""
        return self.projector.placed(self.items.tokens(jnp.maximum(items, 0)))

    def hidden(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        cache: Cache | None = None,
        most_segments: int | None = None,
        longest: int | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """The backbone's layers with the adapters, where there are any; see `Decoder.__call__`."""
        adapter = getattr(self, self.kind, None)
        adapters = adapter and by_matrix(self.kind, nnx.to_pure_dict(nnx.state(adapter, nnx.Param)))
        return self.backbone(x, positions, segment_ids, cache, adapters, most_segments, longest)

    def target_nll(self, batch: Batch) -> jax.Array:
        """Negative log-likelihood of every target, in nats, 0 where the weight is 0.

        Returns:
          [B, M] float32.
        """
        return self._text_nll(self._states(batch, None), batch)

    def item_nll(self, batch: Batch) -> jax.Array:
        """Mean cross-entropy of every segment's items over the catalogue, in nats, 0 where it names none: [B, S]."""
        return self.items.nll(self._answers(self._states(batch, None), batch), batch["item_ids"], None)

    def item_queries(self, batch: Batch) -> jax.Array:
        """[B, S, R] float32: what an item's row is multiplied with, to give its logit as the segment's answer."""
        return self.items.queries(self._answers(self._states(batch, None), batch))

    def losses(self, batch: Batch, dropout_key: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
        """What is trained on, of one forward pass: `target_nll`, none where the text weighs nothing, and `item_nll`
        over drawn items, none without a catalogue.
        """
        hidden, items = self._states(batch, dropout_key), getattr(self, "items", None)
        if items is None:
            return self._text_nll(hidden, batch), None
        text = self._text_nll(hidden, batch) if items.settings.text_weight else None
        # The projector splits the key in three.
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, 3)
        return text, items.nll(self._answers(hidden, batch), batch["item_ids"], key)

    def _states(self, batch: Batch, dropout_key: jax.Array | None) -> jax.Array:
        """[B, T, D] after the last layer, before the final norm."""
        chex.assert_equal_shape([batch["tokens"], batch["positions"], batch["segment_ids"], batch["slots"]])
        chex.assert_equal_shape([batch["target_positions"], batch["target_ids"], batch["target_weights"]])
        items = batch["item_ids"][..., 0] if self.says_items and "item_ids" in batch else None
        x = self.embed(batch["tokens"], batch["slots"], batch["user_embeddings"], dropout_key, items)
        most = batch["user_embeddings"].shape[1]
        longest = batch["longest"].shape[1] if "longest" in batch else None
        return self.hidden(x, batch["positions"], batch["segment_ids"], most_segments=most, longest=longest)[0]

    def _answers(self, hidden: jax.Array, batch: Batch) -> jax.Array:
        """[B, S, D]: what the first token of every segment's reply is predicted from."""
        return self.backbone.before_head(jnp.take_along_axis(hidden, batch["item_positions"][..., None], axis=1))

    def _text_nll(self, hidden: jax.Array, batch: Batch) -> jax.Array:
        hidden = at_places(hidden, batch["target_positions"], batch["target_weights"] > 0)  # [B, M, D]
        return self.nll(hidden, batch["target_ids"]) * batch["target_weights"]

    def nll(self, hidden: jax.Array, ids: jax.Array) -> jax.Array:
        """Nats of the tokens [B, M] that follow where the backbone has the states [B, M, D], [B, M] float32."""
        out = self.backbone
        hidden, head, cap = out.before_head(hidden), out.output_embedding, out.config.logit_cap
        return cross_entropy(hidden, head, ids, cap, out.output_bias, at_once=out.execution.logits_at_once)
