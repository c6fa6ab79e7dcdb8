"""`e2p inspect`."""

import json
import sys
from typing import Any

import rich.table
import tyro

from e2p_jax.commands.common import Json
from e2p_jax.errors import UserError
from e2p_jax.terminal import Console


def inspect(model: tyro.conf.Positional[str], /, revision: str | None = None, as_json: Json = False) -> None:
    """Says what a model is and whether it can be a backbone; exit 1 where a run would be refused.

    Reads config.json and the tokenizer, no weights: they need not be there.

    Args:
      model: What backbone.path takes: a directory in any form, a GGUF file, a hub id, or `embedded`.
      revision: Branch, tag or commit, when the model is a hub id.
    """
    from e2p_jax.plan.inspect import inspect

    found = inspect(model, revision)
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        console = Console(width=None if sys.stdout.isatty() else 120)
        console.print(_table(found))
        for piece in _sample(found):
            console.print(piece, highlight=False)
    if found["refused"]:
        more = "" if len(found["refused"]) == 1 else f" (and for {len(found['refused']) - 1} more reasons)"
        raise UserError(f"refused: {found['refused'][0]}{more}")


def _table(found: dict[str, Any]) -> rich.table.Table:
    table = rich.table.Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("model", f"{found['model']}: {found['family']}, {found['form']}")
    stored = found["dtype"] or "not said"
    if settings := found["quantization"]:
        counts = ", ".join(f"{count} {name}" for name, count in settings.get("tensors", {}).items())
        stored = counts or f"{stored}, quantised: {settings.get('quant_method')}"
    table.add_row("tensors", stored)
    if "sizes" in found:
        _add_shape(table, found)
        table.add_row("inert keys", ", ".join(found["inert_keys"]) or "none")
    for name, value in (("unknown keys", found["unknown_keys"]), ("notes", found.get("notes"))):
        if value:
            table.add_row(name, ("\n" if name == "notes" else ", ").join(value))
    if "tokenizer" in found:
        name, tokens, *special = found["tokenizer"].items()
        said = ", ".join(f"{what} {token!r}" for what, token in special if token is not None)
        table.add_row("tokenizer", f"{name[1]}, {tokens[1]:,} tokens; {said}")
        table.add_row("chat template", found["template"])
    if "stops" in found:
        table.add_row("stop tokens", ", ".join(f"{token!r} ({number})" for token, number in found["stops"].items()))
    for warning in found.get("warnings", ()):
        table.add_row("warning", warning)
    for reason in found["refused"]:
        table.add_row("refused", reason)
    return table


def _add_shape(table: rich.table.Table, found: dict[str, Any]) -> None:
    sizes, memory = found["sizes"], found["memory"]
    experts = f", {sizes['experts_per_token']} of {sizes['experts']} experts" if sizes["experts"] else ""
    if dense := sizes["dense_layers"]:
        experts += f", but in {len(dense)} dense layers ({_ranges(dense)}), MLP {sizes['dense_size']}"
    table.add_row(
        "sizes",
        f"{memory['parameters']:,} parameters; {sizes['num_layers']} layers of width {sizes['hidden_size']}, MLP "
        f"{sizes['intermediate_size']}{experts}; {sizes['num_heads']} heads of {sizes['head_dim']}, "
        f"{sizes['num_kv_heads']} of keys; vocabulary {sizes['vocab_size']:,}"
        f"{', head tied' if sizes['tied_head'] else ''}",
    )
    table.add_row("positions", f"{sizes['positions']:,}")
    for rope in found["ropes"]:
        waves = rope["wavelengths"]
        said = "without positions" if waves is None else f"rotate {rope['rotated']} numbers a head"
        said += f", wavelengths {waves[0]:,.6g} to {waves[1]:,.6g}" if waves else ""
        said += "" if rope["scale"] == 1 else f", x {rope['scale']:.4g}"
        table.add_row("rope", f"{rope['layers']} layers {said}")
    for window in found["windows"]:
        sees = f"see {window['positions']:,} positions back" if window["positions"] else "see everything"
        table.add_row("windows", f"{window['layers']} layers {sees}")
    if (linear := found["linear"])["layers"]:
        heads = f"{linear['key_heads']} heads of keys, {linear['value_heads']} of values"
        table.add_row("linear attention", f"{linear['layers']} layers keep a state: {heads}")
    held = ", ".join(f"{name} {size / 1e9:,.3f} GB" for name, size in memory["bytes"].items())
    table.add_row("memory", f"weights: {held}")


def _ranges(numbers: list[int]) -> str:
    """Ascending whole numbers: `0 to 2, 7`."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True))


def _sample(found: dict[str, Any]) -> list[str]:
    """The sample conversation, `[[target]]`, and a mark after each stop token."""
    if not found.get("sample"):
        return []
    text = ""
    for is_target, piece in ((piece["target"], piece) for piece in found["sample"]):
        written = piece["text"] + ("<stops>" if piece["stop"] else "")
        text += f"[[{written}]]" if is_target else written
    return ["A sample conversation, [[targets]] and what <stops> generation:", text.replace("]][[", "")]
