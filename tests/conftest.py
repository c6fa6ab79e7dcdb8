"""Strictness and sizes for every test: several CPU devices, strict dtypes and ranks, a persistent compilation cache."""

import os
import tempfile
from pathlib import Path

from xla_flags import xla_flags

os.environ["XLA_FLAGS"] = f"{xla_flags(devices=4)} {os.environ.get('XLA_FLAGS', '')}"  # the last word is the caller's
# XLA runs collectives on one thread a core: with fewer cores than devices they may wait for each other for ever.
os.environ["PJRT_NPROC"] = "16"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"  # torch's models are tiny, and its threads would wait for each other by spinning
# One for all processes of the tests and for those that they start.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parent.parent / ".cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules")  # code of exported models, of this process
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cache")  # tokenised data, fingerprints
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import functools
import gc
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("untimed", deadline=None)  # how fast a machine is decides no test
hypothesis.settings.load_profile("untimed")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

FLAGS = """headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking
disable-component-update disable-sync""".split()  # noqa: SIM905 (as one would type them)
# Files and folders whose tests train, export, start processes or go through every family: most of the time.
SLOW = """backbone/test_convert backbone/test_family_parity backbone/test_gguf backbone/test_parity
backbone/test_quantize cli datasets/test_prepare datasets/test_tfds_builders embed evaluate/test_compare
evaluate/test_drift evaluate/test_generate evaluate/test_rank evaluate/test_robustness export launch
parallel/test_distributed plan/test_plan report test_benchmarks test_lint test_package
test_registry train/test_collectives train/test_identity train/test_loop train/test_open train/test_step
train/test_unlucky""".split()  # noqa: SIM905 (as above)
SHARED = Path(__file__).parent.parent.parent / "shared"


@functools.cache
def is_slow(path: Path) -> bool:
    places = [Path(__file__).parent / name for name in SLOW]
    return any(path.with_suffix("").is_relative_to(place) for place in places)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is slow, and puts it first: at the end of a run no worker waits for another's long test."""
    for item in items:
        if is_slow(item.path):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """What is imported stays: looking for cycles in it, and as often, takes a tenth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


@pytest.fixture
def shared() -> Path:
    """The folder with real data and a real checkpoint, where a developer has one."""
    if not SHARED.is_dir():
        pytest.skip("the shared folder with real data is absent beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of width 32 with random weights and the embedded backbone's tokenizer: a Hugging Face directory."""
    import json
    import shutil

    import jax.numpy as jnp
    from flax import nnx

    from e2p_jax.backbone import weights
    from e2p_jax.backbone.decoder import Decoder
    from e2p_jax.backbone.families import read_config

    skeleton = tmp_path_factory.mktemp("skeleton")
    for name in weights.COMPANIONS:
        if (weights.EMBEDDED / name).is_file():
            shutil.copyfile(weights.EMBEDDED / name, skeleton / name)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = json.loads((skeleton / "config.json").read_text()) | sizes
    (skeleton / "config.json").write_text(json.dumps(config))
    decoder = Decoder(read_config(skeleton), dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    out = tmp_path_factory.mktemp("backbones") / "tiny"
    weights.save(decoder, skeleton, out, jnp.dtype("float32"))
    return out


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """Chromium by its driver; a profile of its own, nothing of it goes to the network."""
    names = ("chromium", "chromium-browser", "google-chrome")  # Debian's, Ubuntu's, GitHub's machines'
    chromium = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("Chromium or its driver is absent: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is absent: pip install selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS, f"user-data-dir={tmp_path / 'profile'}", "window-size=1280,900"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Four megabytes, apart from all others."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small disk needs root, and a machine that allows mounts")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(scope="session")
def learned_run(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Projector and tiny backbone trained until a user's own vector tells what the user says; evaluated on the same.

    One for all test processes; nobody changes it.
    """
    import fcntl

    import numpy as np

    from e2p_jax.config import BackboneConfig, Config, DataConfig, EvaluateConfig, TrainConfig
    from e2p_jax.datasets import synthetic
    from e2p_jax.datasets.records import write_jsonl
    from e2p_jax.prefix import mlp
    from e2p_jax.train.loop import train
    from e2p_jax.vectors.table import save_table

    base, users = tmp_path_factory.getbasetemp(), range(24)
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "learned"
    folder.mkdir(exist_ok=True)
    config = Config(
        backbone=BackboneConfig(path=str(tiny_backbone)),
        data=DataConfig(
            path=str(folder / "records.jsonl"),
            embeddings=str(folder / "table"),
            train_split="all",
            eval_splits=("all",),
            seq_len=128,
        ),
        projector=mlp.Settings(hidden_size=16, dropout=0.0),
        train=TrainConfig(
            trainable=("projector/**", "backbone/**"),
            steps=200,
            rows=8,
            learning_rate=1e-2,
            warmup_steps=5,
            eval_every=50,
            checkpoint_every=150,
        ),
        evaluate=EvaluateConfig(bootstrap_samples=200, prompts=("good morning!",)),
    )
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "trained").exists():
            write_jsonl([synthetic.record(user) for user in users], folder / "records.jsonl")
            vectors = np.stack([synthetic.vector(user) for user in users])
            save_table(folder / "table", [f"user-{user}" for user in users], vectors, name="synthetic", version="1")
            train(config, folder / "run")
            (folder / "trained").touch()
    return folder / "run"
