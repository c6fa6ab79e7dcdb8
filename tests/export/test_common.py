"""What no export writes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from e2p_jax.errors import UserError
from e2p_jax.export.demo import find_people
from e2p_jax.export.engines import export_engine
from e2p_jax.export.peft import export_peft
from e2p_jax.export.prefix_table import export_prefixes
from e2p_jax.export.transformers import export_transformers
from e2p_jax.train.run import Run

EXPORTS: dict[str, Callable[[Run, Path], object]] = {
    "transformers": lambda run, out: export_transformers(run, out, include_backbone=False),
    "peft": lambda run, out: export_peft(run, out, ["user-1"]),
    "vllm": lambda run, out: export_engine(run, "vllm", ["user-1"], "hi"),
    "prefixes": lambda run, out: export_prefixes(run, out, "float32"),
    "demo": lambda run, out: find_people(run),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_a_run_that_learned_nothing_of_users_has_no_soft_tokens_of_theirs(
    make_run: Callable, tmp_path: Path, name: str
):
    """The matrix of prompt tuning, of which the bias alone trained, is as random as it began."""
    run = make_run()
    config = run.inputs.config.change(data={"condition": "static"})
    static = dataclasses.replace(run, inputs=dataclasses.replace(run.inputs, config=config))
    with pytest.raises(UserError, match=r"trained under data\.condition=static, on no users' vectors"):
        EXPORTS[name](static, tmp_path / "out")
    assert not (tmp_path / "out").exists()
