"""What one soft token of no user does to a real model, by where it stands: nats a target beyond no token at all.

    python benchmarks/sink.py MODEL records.jsonl --records 16

MODEL is a Hugging Face directory, which transformers runs in float32. A token is drawn around the mean of the token
embeddings with their spread (`1`), is four times that, the bound of `projector.max_scale` (`4`), zeros (`zero`) or a
word's embedding (`word`). The worst dialogue is what counts: a model that collects attention at its first position (an
attention sink) breaks under some tokens that stand there, and not under others.
"""

import argparse
import itertools
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import transformers

from e2p_jax.config import Config, DataConfig, Placement
from e2p_jax.data.encode import Encoder, load_tokenizer
from e2p_jax.datasets.prepared import load_records

KINDS = ("1", "4", "zero", "word")


def soft_token(embeddings: torch.Tensor, kind: str, generator: torch.Generator) -> torch.Tensor:
    """[D]."""
    noise = torch.randn(embeddings.shape[1], generator=generator)
    if kind == "word":
        return embeddings[int(torch.randint(len(embeddings), (1,), generator=generator))]
    if kind == "zero":
        return torch.zeros_like(noise)
    return float(kind) * (embeddings.mean(0) + embeddings.std(0) * noise)


@torch.inference_mode()
def nll(model: transformers.PreTrainedModel, embedded: torch.Tensor, tokens: np.ndarray, targets: np.ndarray) -> float:
    """Mean over the targets of one conversation, embedded [T, D]."""
    hidden = model.model(inputs_embeds=embedded[None]).last_hidden_state[0, targets - 1]
    logits = model.lm_head(hidden).float()
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[targets]).long()))


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", help="as data.path")
    parser.add_argument("--split", default="validation", help="of the data")
    parser.add_argument("--records", type=int, default=16, help="dialogues, evenly spaced")
    flags = parser.parse_args()
    model = transformers.AutoModelForCausalLM.from_pretrained(flags.model, dtype=torch.float32).eval()
    look_up = model.get_input_embeddings()
    embeddings = look_up.weight.detach() * float(getattr(look_up, "embed_scale", 1.0))
    tokenizer = load_tokenizer(flags.model, len(embeddings))
    config = Config(data=DataConfig(seq_len=1024))
    records = load_records(flags.data, flags.split)
    chosen = [records[int(n)] for n in np.linspace(0, len(records) - 1, flags.records)]
    places = get_args(Placement)
    beyond: dict[tuple[str, str], list[float]] = {key: [] for key in itertools.product(places, KINDS)}
    for number, record in enumerate(chosen):
        for place in places:
            encoder = Encoder.from_config(config.change(prefix={"placement": place}), tokenizer)
            bare, example = encoder.encode(record, "none"), encoder.encode(record, "e2p")
            base = nll(model, embeddings[bare.tokens], bare.tokens, np.flatnonzero(bare.is_target))
            for kind in KINDS:
                embedded = embeddings[example.tokens].clone()
                soft = soft_token(embeddings, kind, torch.Generator().manual_seed(number))
                embedded[torch.tensor(example.slot_places(1).ravel())] = soft
                beyond[place, kind].append(
                    nll(model, embedded, example.tokens, np.flatnonzero(example.is_target)) - base
                )
    print(f"{flags.model.name}: {len(chosen)} dialogues, nats a target beyond none: mean, worst, share above 0.3")
    for (place, kind), values in beyond.items():
        print(
            f"{place:12s} {kind:5s} {np.mean(values):+.3f} {np.max(values):+.3f} {np.mean(np.array(values) > 0.3):.2f}"
        )


if __name__ == "__main__":
    main()
