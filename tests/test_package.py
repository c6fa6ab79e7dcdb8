"""The wheel: what an installed package finds is what a checkout finds."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = """
import e2p_jax
from e2p_jax.backbone.tensor_files import Checkpoint
from e2p_jax.backbone.weights import resolve
from e2p_jax.config import config_directory, load_config
print(e2p_jax.__file__)
print(",".join(sorted(str(p.relative_to(config_directory())) for p in config_directory().rglob("*.py"))))
print(load_config("quickstart")[1].to_json())
print(Checkpoint(resolve("embedded", None)).fingerprint())
"""


def says(path: Path, elsewhere: Path) -> list[str]:
    """What the package in `path` prints when it is used from another directory."""
    program = f"import sys; sys.path.insert(0, {str(path)!r})\n{SCRIPT}"
    done = subprocess.run([sys.executable, "-c", program], cwd=elsewhere, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_wheel_finds_the_same_configs_and_backbone(tmp_path: Path):
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path / "dist")]
    subprocess.run(build, cwd=ROOT, capture_output=True, check=True)
    (wheel,) = (tmp_path / "dist").glob("e2p_jax-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    installed, checkout = says(tmp_path / "site", tmp_path), says(ROOT, tmp_path)
    assert installed[0] == str(tmp_path / "site" / "e2p_jax" / "__init__.py")
    assert checkout[0] == str(ROOT / "e2p_jax" / "__init__.py")
    assert installed[1:] == checkout[1:] and "persona_chat.py" in installed[1]
