"""A GGUF file as a model directory: what it says in Hugging Face's files, and beside them the file itself."""

import collections
import hashlib
import json
from pathlib import Path

from e2p_jax.backbone.families import parse_config, read_config
from e2p_jax.backbone.gguf import config, file, tokenizer
from e2p_jax.backbone.gguf.tensors import tensors
from e2p_jax.backbone.tensor_files import Checkpoint, stamp
from e2p_jax.files import replace_directory, user_cache

WEIGHTS = "model.gguf"  # in the directory: a link


class GgufCheckpoint(Checkpoint):
    """Opened; it offers what `Checkpoint` does."""

    def __init__(self, directory: Path):
        """Opens the directory's `model.gguf`.

        Raises:
          UserError: unreadable, or its metadata is.
        """
        path = (directory / WEIGHTS).resolve()
        opened = stamp([path])
        held = file.read_file(path)
        stored = {f"{name} {tensor.kind}": tensor.data for name, tensor in held.tensors.items()}
        self._hold(directory, [path], opened, stored, tensors(held, read_config(directory)))
        self.duplicates = {}


def kinds(directory: Path) -> dict[str, int]:
    """How many tensors of the directory's `model.gguf` are stored in which way."""
    path = (directory / WEIGHTS).resolve()
    held = file.read_file(path)
    names = file.gguf_package(path).GGMLQuantizationType
    return dict(collections.Counter(names(tensor.kind).name for tensor in held.tensors.values()).most_common())


def unfold(path: Path) -> Path:
    """The model directory of a GGUF file: made once, in the user's cache, for as long as the file is not written to.

    Raises:
      UserError: not a GGUF file, or of a kind that is not supported; the cache cannot be written.
    """
    path = path.resolve()
    sources = sorted(Path(__file__).parent.glob("*.py"))  # another version of this code may say it otherwise
    said = b"".join(source.read_bytes() for source in sources)
    place = user_cache() / "gguf" / hashlib.sha256(stamp([path]).encode() + said).hexdigest()[:32]
    if not (place / WEIGHTS).is_file():
        with replace_directory(place) as temporary:
            write_companions(path, temporary)
            (temporary / WEIGHTS).symlink_to(path)
    return place


def write_companions(path: Path, out: Path) -> None:
    """Writes what a model directory holds beside its weights."""
    held = file.read_file(path)
    said = config.make_config(held)
    parse_config(said, path)
    for name, values in (("config.json", said), ("generation_config.json", config.make_generation_config(held))):
        (out / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    tokenizer.write_tokenizer(held, out)
