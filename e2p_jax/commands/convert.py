"""`e2p convert`."""

from pathlib import Path
from typing import Literal

import tyro


def convert(
    model: tyro.conf.Positional[str],
    /,
    out: Path,
    revision: str | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
) -> None:
    """Writes a Hugging Face model as a Flax (Orbax) checkpoint, or such a checkpoint as a Hugging Face model again.

    The tensors keep their bytes and dtypes, and both forms have one fingerprint: either serves as backbone.path. A GGUF
    file and a quantised model are dequantised, and written as a plain Hugging Face model.

    Args:
      model: What backbone.path takes: a directory in any form, a GGUF file, a hub id, or `embedded`.
      out: Directory to write.
      revision: Branch, tag or commit, when the model is a hub id.
      dtype: Of what is dequantised.
    """
    from e2p_jax.backbone import convert as conversion
    from e2p_jax.backbone.weights import resolve

    directory = resolve(model, revision)
    name = str(directory.resolve()) if Path(model).expanduser().is_dir() else model
    conversion.convert(directory, out, name, revision, dtype)
    print(out)
