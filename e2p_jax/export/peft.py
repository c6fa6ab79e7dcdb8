"""Users' prefixes as stock PEFT prompt-tuning adapters (Lester et al., arXiv 2104.08691; PEFT's PROMPT_TUNING)."""

import contextlib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from e2p_jax.backbone.weights import EMBEDDED
from e2p_jax.data.encode import Encoder
from e2p_jax.datasets.records import Record
from e2p_jax.errors import UserError
from e2p_jax.evaluate.generate import asked_for
from e2p_jax.export.common import refuse_foreign, refuse_not_finite, refuse_not_of_users
from e2p_jax.export.payloads import soft_tokens
from e2p_jax.files import replace_directory
from e2p_jax.terminal import say
from e2p_jax.train.run import Run

CAVEAT = (
    "PEFT 0.21 with transformers 5.24 puts the soft tokens in again at every step unless generate() is called with "
    "use_cache=False (or transformers is below 5.24), and in front of any padding on the left with every version: give "
    "it prompts of one length, of one user at a time; such an adapter cannot be merged into the weights"
)
REST = "{name: value[:, 1:] for name, value in inputs.items()}"
FIRST_TOO = (
    "an adapter begins with the prompt's first token, so leave that off what you give it: "
    f"model.generate(**{REST}, use_cache=False)"
)
_USERS = "users.json"
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "README.md")
_DEVICES = re.compile("con|prn|aux|nul|(com|lpt)[0-9]")  # no names of files on Windows
_CARD = """\
# The soft tokens of one user

A prompt-tuning adapter that `e2p export --format peft` wrote. {said}. {caveat}.

```python
import peft
import transformers

backbone = transformers.AutoModelForCausalLM.from_pretrained({backbone}, revision={revision})
model = peft.PeftModel.from_pretrained(backbone, ".")
{given}model.generate(**inputs, use_cache=False, max_new_tokens=32)
```
"""


def adapter_directory(user: str) -> str:
    """The name of the directory for what `--user` says, on any file system: no two users share one, whatever their ids.

    Lower-case ids of letters, digits, `_` and `-` are their own names; others are named by what is plain of them and
    32 digits of the SHA-256 of their UTF-8.
    """
    if re.fullmatch("[a-z0-9_][a-z0-9_-]{0,63}", user) and not _DEVICES.fullmatch(user):
        return user
    plain = re.sub("[^a-z0-9_]+", "-", user.lower())[:40].strip("-")
    digest = hashlib.sha256(user.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{'user' if not plain or _DEVICES.fullmatch(plain) else plain}.{digest[:32]}"


def export_peft(run: Run, out: Path, users: Sequence[str]) -> None:
    """Writes `out/<user>/adapter_config.json` and `adapter_model.safetensors`: `PeftModel.from_pretrained` needs no
    code of ours to load them in front of the run's backbone. `out/users.json` says which directory is whose.

    PEFT's virtual tokens come first. So those of a run with `after_bos` are K + 1: the embedding of the conversation's
    first token, which is then left off the prompt, and the K soft tokens behind it.

    Args:
      users: ids in the run's table of user vectors, `@vector.npy`, or `@@alice` for the user `@alice`; one twice is
        written once.

    Raises:
      UserError: no users, an unknown one, soft tokens that are not finite, a placement that PEFT has no word for, a
        trained backbone, or other files in `out`.
    """
    users = list(dict.fromkeys(users))
    config, decoder = run.inputs.config, run.inputs.decoder
    refuse_not_of_users(run)
    if not users:
        raise UserError("--format peft writes one adapter per user: name them with --user")
    if config.prefix.placement not in ("before_bos", "after_bos"):
        raise UserError(
            "PEFT's virtual tokens are the beginning of a prompt, this run's soft tokens stand "
            f"{config.prefix.placement}; export --format transformers, or train with prefix.placement=after_bos"
        )
    first = [_first_token(run.inputs.encoder)] if config.prefix.placement == "after_bos" else []
    refuse_foreign(out, _is_ours)
    refuse_not_finite(run, {"projector": run.model.params["projector"]})
    path, revision = run.inputs.published()
    path = str(EMBEDDED) if path == "embedded" else path
    _, vectors = asked_for(run, users)
    soft = np.asarray(run.model.merged.projector(vectors))  # [N, K, D]
    begins = np.asarray(run.model.merged.backbone.embed(np.array([first], np.int32))[0], soft.dtype)  # [0 or 1, D]
    settings = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": config.projector.num_tokens + len(first),
        "token_dim": decoder.hidden_size,
        "num_transformer_submodules": 1,
        "num_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "base_model_name_or_path": path,
        "revision": revision,
        "inference_mode": True,
    }
    said = FIRST_TOO[0].upper() + FIRST_TOO[1:] if first else "They stand in front of the prompt"
    given = f"inputs = {REST}\n" if first else ""
    card = _CARD.format(said=said, given=given, caveat=CAVEAT, backbone=json.dumps(path), revision=repr(revision))
    with replace_directory(out) as temporary:
        listed = []
        for user, prefix in zip(users, soft, strict=True):
            place = temporary / adapter_directory(user)
            place.mkdir()
            (place / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
            tensors = {"prompt_embeddings": np.concatenate([begins, soft_tokens(prefix, prefix.dtype, user)])}
            save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
            (place / "adapter_model.safetensors").chmod(0o644)
            (place / "README.md").write_text(card, encoding="utf-8")
            own = user.startswith("@") and not user.startswith("@@")
            listed.append({"user": f"@{Path(user).name}" if own else user, "directory": place.name})
        (temporary / _USERS).write_text(json.dumps(listed, indent=2) + "\n")
    say(f"{f'{FIRST_TOO}; ' if first else ''}{CAVEAT}; whose directory is which stands in {out / _USERS}")


def _first_token(encoder: Encoder) -> int:
    """The token that every conversation begins with.

    Raises:
      UserError: there is none.
    """
    user, system = ({"role": role, "content": text} for role, text in (("user", "hi"), ("system", "Be kind.")))
    found = set()
    for messages in [(user,), (user | {"content": "Why?"},), (system, user)]:
        with contextlib.suppress(UserError):  # what the template refuses begins with nothing
            found.add(int(encoder.encode_prompt(Record("probe", (), messages), "none").tokens[0]))
    if len(found) != 1:
        raise UserError(
            "PEFT's virtual tokens are the beginning of a prompt, and this run's chat template begins conversations in "
            "more than one way; export --format transformers, or train with prefix.placement=before_bos"
        )
    return found.pop()


def _is_ours(out: Path) -> bool:
    places = [path for path in out.iterdir() if path.name != _USERS]
    return all(path.is_dir() and {p.name for p in path.iterdir()} <= set(_ADAPTER) for path in places)
