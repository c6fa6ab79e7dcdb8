"""Configuration of an exported Embedding-to-Prefix model."""

import transformers
from transformers import AutoConfig, PretrainedConfig


class E2PConfig(PretrainedConfig):
    """A frozen causal LM and the projector that turns a user's vector into its first soft tokens.

    Args:
      backbone_config: config of the LM.
      backbone: where the LM's weights are, if not in this directory: `path`, `revision` and `fingerprint`.
      placement: where the soft tokens stand: `before_bos`, `after_bos` (after the first token), `in_chat`, or
        `before_reply`.
      user_turn: how a user's turn opens (`in_chat` stands after the first that does): `ids`; `tail`, ids that follow
        them as far as they were not joined to the text; `opening`, whether only the beginning of a prompt counts.
      reply_opening: how a reply opens (`before_reply` stands at each): `ids`, and how far into them, `offset`.
      num_soft_tokens: soft tokens per user.
      num_shared_tokens: how many of them, the last ones, are the same for everybody.
      max_soft_token_rms: what a soft token's root mean square is held to, whatever the vector; None for no bound.
      embedding_size: width of a user vector.
      projector_kind: a key of `PROJECTORS` in modeling_e2p.py; the kind's own settings are `projector_NAME`.
      null_user: whether the projector has a learned vector for users without one.
      num_items: items of the catalogue; 0 where there is none.
      item_size: width of an item's row.
      item_token: whether the item that is picked stands in front of the reply.

    Raises:
      ValueError: the LM's config is in a dialect that this version of transformers does not read.
    """

    model_type = "e2p"
    sub_configs = {"backbone_config": AutoConfig}

    def __init__(
        self,
        backbone_config=None,
        backbone=None,
        placement="before_bos",
        user_turn=None,
        reply_opening=None,
        num_soft_tokens=1,
        num_shared_tokens=0,
        max_soft_token_rms=None,
        embedding_size=1,
        projector_kind="mlp",
        null_user=False,
        num_items=0,
        item_size=1,
        item_token=False,
        **kwargs,
    ):
        if isinstance(backbone_config, dict):
            values = dict(backbone_config)
            if "rope_parameters" in values and int(transformers.__version__.split(".")[0]) < 5:
                raise ValueError(
                    "backbone_config was saved by transformers 5, and this version would overlook its rope_parameters; "
                    "upgrade transformers"
                )
            backbone_config = AutoConfig.for_model(values.pop("model_type"), **values)
        self.backbone_config = backbone_config
        self.backbone = backbone
        self.placement = placement
        self.user_turn = user_turn
        self.reply_opening = reply_opening
        self.num_soft_tokens = num_soft_tokens
        self.num_shared_tokens = num_shared_tokens
        self.max_soft_token_rms = max_soft_token_rms
        self.embedding_size = embedding_size
        self.projector_kind = projector_kind
        self.null_user = null_user
        self.num_items = num_items
        self.item_size = item_size
        self.item_token = item_token
        super().__init__(**kwargs)

    def get_text_config(self, *args, **kwargs):
        """The LM's config: what generation reads vocabulary and cache sizes from."""
        return self if self.backbone_config is None else self.backbone_config
