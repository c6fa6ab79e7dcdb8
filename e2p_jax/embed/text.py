"""User vectors from a text encoder: any model that sentence-transformers loads. The only part that imports torch."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from e2p_jax.embed.contexts import vectors_of_contexts
from e2p_jax.errors import UserError


def embed(data: str, encoder: str, blocks: int) -> tuple[Sequence[str], np.ndarray]:
    """Ids of all users, and vectors of their contexts; see `text_vectors`."""
    return vectors_of_contexts(data, lambda contexts: text_vectors(contexts, encoder), blocks)


def text_vectors(contexts: Sequence[tuple[str, ...]], encoder: str) -> np.ndarray:
    """Mean of a context's sentence embeddings, each of length 1, brought to length 1.

    Args:
      contexts: N contexts of one text or more.
      encoder: directory or hub id of a sentence-transformers model, or of a plain transformers one, whose sentence
        embedding is then the mean over its last hidden states, and with a decoder the last of them.

    Returns:
      [N, E] float32.

    Raises:
      UserError: sentence-transformers is not installed, or does not load the encoder.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise UserError(f"--encoder {encoder}: needs sentence-transformers; pip install 'e2p-jax[embed]'") from error
    try:
        model = SentenceTransformer(encoder, device="cpu" if Path(encoder).is_dir() else None)
    except Exception as error:  # whatever a directory that is no model makes it raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--encoder {encoder}: sentence-transformers does not load it ({reason})") from error
    if model.tokenizer.pad_token is None:  # as decoders have none; what stands for it is masked
        model.tokenizer.pad_token = model.tokenizer.eos_token or model.tokenizer.convert_ids_to_tokens(0)
    sentences = list(dict.fromkeys(text for context in contexts for text in context))
    encoded = model.encode(sentences, batch_size=64, normalize_embeddings=True, show_progress_bar=False)
    place = {sentence: row for row, sentence in enumerate(sentences)}
    means = np.stack([encoded[[place[t] for t in context]].mean(axis=0, dtype=np.float64) for context in contexts])
    return (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float32)
