"""A tokenizer made on the spot (byte-level BPE, 600 tokens) and conversations to feed it."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from e2p_jax.datasets import synthetic
from e2p_jax.datasets.records import Record

SPECIAL = [
    "<pad>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [m["content"] for user in range(100) for m in synthetic.record(user).messages]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer(bpe: Tokenizer) -> Callable[..., PreTrainedTokenizerFast]:
    """Wraps the BPE as Transformers would load it; keyword arguments set `chat_template` or other tokens."""

    def make(**changes: object) -> PreTrainedTokenizerFast:
        tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **changes}
        copy = Tokenizer.from_str(bpe.to_str())
        return PreTrainedTokenizerFast(tokenizer_object=copy, name_or_path="made-here", **tokens)

    return make


@pytest.fixture(scope="session")
def talk() -> Callable[..., Record]:
    """A record whose turns alternate user, assistant, ...; `system` goes in front."""

    def make(*turns: str, system: str | None = None, context: tuple[str, ...] = ()) -> Record:
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return Record("ann", context, tuple(messages), source="talk.jsonl:1")

    return make
