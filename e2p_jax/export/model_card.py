"""README.md of an exported model."""

import json
from pathlib import Path

from e2p_jax.train.run import Run

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [embedding-to-prefix, e2p_jax]
---

# Embedding-to-Prefix: {backbone}

A frozen LM and a projector that turns a user's vector ({width} numbers) into {tokens} soft token(s), placed
`{placement}` ([arXiv 2505.17051](https://arxiv.org/abs/2505.17051)). Trained with e2p_jax, step {step}, seed {seed},
on `{data}`.

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".", padding_side="left", trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
messages = [[{{"role": "user", "content": "hi! what do you like?"}}]] * 2
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
)
vectors = torch.zeros(2, {width})  # one row per user, as they stand in your table of user vectors
output = model.generate(**inputs, user_embedding=vectors, max_new_tokens=32)
print(tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

`forward(..., user_embedding=...)` returns logits that are {tokens} position(s) longer than `input_ids`, the soft
token(s) included. `model.backbone` is the LM without a prefix.
{quantization}{results}"""

_QUANTIZED = """
Trained, and measured below, in front of the LM with its layers' matrices in {kind}. Here it stands, or is named, as it
was published: what it scores differs by what the quantisation costs.
"""


def model_card(run: Run) -> str:
    """Writes what the model is, a runnable example, and what `e2p train` measured."""
    config = run.inputs.config.portable()
    backbone, kind = run.inputs.published()[0], config.backbone.quantization
    return _CARD.format(
        backbone=Path(backbone).name if Path(backbone).is_absolute() else backbone,
        width=int(run.model.params["projector"]["input_mean"].shape[0]),
        tokens=config.projector.num_tokens,
        placement=config.prefix.placement,
        step=run.step,
        seed=config.train.seed,
        data=config.data.path,
        quantization="" if kind == "none" else _QUANTIZED.format(kind=kind),
        results=_results(run),
    )


def _results(run: Run) -> str:
    path = run.directory / "report" / "evaluation.json"
    if not path.is_file():
        return ""
    lines = ["", "| split | condition | NLL per target token | perplexity per word |", "|---|---|---|---|"]
    for split in json.loads(path.read_text())["splits"]:
        for name, values in split["conditions"].items():
            lines.append(
                f"| {split['split']} | {name} | {values['nll_per_target']:.4f} | {values['word_perplexity']:.2f} |"
            )
    return "\n".join(lines) + "\n"
