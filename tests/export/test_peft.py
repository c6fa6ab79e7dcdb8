"""Adapters that stock PEFT loads, against the prefix inside e2p_jax."""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from helpers import assert_close

from e2p_jax.errors import UserError
from e2p_jax.evaluate.generate import vectors_for
from e2p_jax.export.peft import export_peft

# PEFT itself asks transformers for a property that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

USERS = ["user-3", "user-7"]
TOKENS = np.array([[1, 40, 50, 60, 70, 80]], np.int32)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_logits_are_the_same(make_run: Callable, lively_backbone: Path, tmp_path: Path, num_tokens: int):
    run = make_run("before_bos", num_tokens, "mlp" if num_tokens == 1 else "linear")
    export_peft(run, tmp_path / "out", USERS)
    model = nnx.merge(run.model.graph, run.model.params)
    length = TOKENS.shape[1] + num_tokens
    tokens = jnp.asarray(np.concatenate([np.zeros((1, num_tokens), np.int32), TOKENS], axis=1))
    slots = jnp.where(jnp.arange(length)[None] < num_tokens, jnp.arange(length)[None], -1)
    ones = jnp.ones((1, length), jnp.int32)
    seen = []
    for user in USERS:
        vector = jnp.asarray(vectors_for(run, [user], [user], "e2p"))[None]
        hidden, _ = model.backbone(model.embed(tokens, slots, vector), jnp.arange(length)[None], ones)
        base = transformers.AutoModelForCausalLM.from_pretrained(lively_backbone, dtype=torch.float32)
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out" / user)
        with torch.no_grad():
            theirs = adapted(input_ids=torch.tensor(TOKENS.tolist())).logits.numpy()
        assert_close(model.backbone.logits(hidden), theirs)
        seen.append(theirs[:, -1])
    assert np.abs(seen[0] - seen[1]).max() > 1e-3


def test_what_peft_cannot_say_is_refused(make_run: Callable, tmp_path: Path):
    with pytest.raises(UserError, match="before BOS, this run's stand after_bos"):
        export_peft(make_run("after_bos", 2, "mlp"), tmp_path / "out", USERS)
    with pytest.raises(UserError, match="name them with --user"):
        export_peft(make_run(), tmp_path / "out", [])
    with pytest.raises(UserError, match="nobody"):
        export_peft(make_run(), tmp_path / "out", ["nobody"])
    assert not (tmp_path / "out").exists()
