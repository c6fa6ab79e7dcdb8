"""llama.cpp's library by the recipe of docs/serving.md, against `e2p generate`, in front of a GGUF file."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType
from test_engines import PROMPT
from test_import_back import in_front_of_gguf

from e2p_jax.datasets.records import Record
from e2p_jax.evaluate.generate import Sampling, generate, vectors_for
from e2p_jax.export.prefix_table import export_prefixes

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp_py_sync") is None, reason="pip install llama-cpp-py-sync: see docs/serving.md"
)
DOCS = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
USERS, NEW = ["user-1", "user-2", "user-3"], 12


@pytest.mark.parametrize("way", [("after_bos", 1, "mlp"), ("before_reply", 3, "linear")], ids=str)
def test_llama_cpp_says_what_we_generate(
    make_run: Callable, lively_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: tuple
):
    run = in_front_of_gguf(make_run(*way), lively_backbone, GGMLQuantizationType.F32, tmp_path)
    export_prefixes(run, tmp_path / "prefixes", "float32")
    hi, no = {"role": "user", "content": "hi!"}, {"role": "assistant", "content": "no."}
    talks = [({"role": "user", "content": PROMPT},), (hi, no, {"role": "user", "content": PROMPT})]
    asked = [Record(user, (), said, source=user) for user in USERS for said in talks]
    names = [record.user_id for record in asked]
    wanted = generate(run, asked, vectors_for(run, names, names, "e2p"), "e2p", Sampling(max_new_tokens=NEW))
    assert len(set(wanted)) == len(asked), "the prefix makes no difference here, so nothing is tested"
    monkeypatch.chdir(tmp_path)
    section = DOCS[DOCS.index("## llama.cpp") :]
    seen: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0], seen)
    assert [seen["reply"](record.user_id, list(record.messages), NEW) for record in asked] == wanted
