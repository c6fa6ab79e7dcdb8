"""Chat templates with generation markers.

Targets are what a template puts between `{% generation %}` and `{% endgeneration %}`. Where that template comes from:

1. `data.chat_template` names a file: that one; it must have the markers.
2. The tokenizer has a template with markers: that one.
3. The tokenizer has a template without markers: it is wrapped (`add_markers`). The wrapper renders the original up to
   each assistant turn, with the generation prompt, and through it; what the turn added, up to its last
   character that is not white space, is the target. It checks itself on every conversation: a template that
   rewrites earlier turns when later ones arrive, or whose generation prompt is not how a reply begins, is refused.
4. That does not do, or `data.thinking` asks for something else: every reply is rendered as earlier ones are, with or
   without a thinking block in front (`steady.py`).
5. The tokenizer has none: the plain one, `plain.jinja`.

A template that asks for today's date (`strftime_now`, as Llama 3.2's) is told `data.template_date`: the same
tokens come out on every day, and of the template that goes with a run or an export.

Every template is tried before it is used (`bounded`): one that does not end is refused.
"""

import datetime
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from e2p_jax.config import Thinking
from e2p_jax.data import bounded
from e2p_jax.data.control import unguarded
from e2p_jax.data.steady import Steady, make_steady
from e2p_jax.errors import UserError

PLAIN = Path(__file__).parent / "plain.jinja"

_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKERS = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")

_OURS = "{%- macro conversation(messages, add_generation_prompt) %}"  # what `add_markers` and `make_steady` begin with
# The first tag leaves white space that the original begins with alone (Transformers trims the line break after a tag).
_WRAPPER = """\
{%- macro conversation(messages, add_generation_prompt) %}
ORIGINAL
{%- endmacro -%}
{%- set done = namespace(text='') -%}
{%- for i in range(messages | length) -%}
    {%- if messages[i]['role'] == 'assistant' -%}
        {%- set before = conversation(messages[:i], true) | string -%}
        {%- set after = conversation(messages[:i + 1], false) | string -%}
        {%- if not before.startswith(done.text) -%}
            {{- raise_exception('it rewrites earlier turns when later ones arrive') -}}
        {%- elif not after.startswith(before) -%}
            {{- raise_exception('its generation prompt is not how a reply begins') -}}
        {%- endif -%}
        {%- set reply = after[before | length:] -%}
        {{- before[done.text | length:] -}}
        {%- generation -%}{{- reply.rstrip() -}}{%- endgeneration -%}
        {{- reply[reply.rstrip() | length:] -}}
        {%- set done.text = after -%}
    {%- endif -%}
{%- endfor -%}
{%- set whole = conversation(messages, add_generation_prompt) | string -%}
{%- if not whole.startswith(done.text) -%}
    {{- raise_exception('it rewrites earlier turns when later ones arrive') -}}
{%- endif -%}
{{- whole[done.text | length:] -}}
"""

_PROBE = [
    {"role": "user", "content": "first question"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "second question"},
    {"role": "assistant", "content": "second answer"},
]
_TRIED = (
    ("user", "assistant") * 2,
    ("system", "user", "assistant", "user"),
    ("user", "user", "assistant", "assistant"),
    ("assistant", "user", "assistant"),
)


def add_markers(template: str) -> str:
    """Wraps a template without generation markers into one that has them and renders the same text."""
    return _WRAPPER.replace("ORIGINAL", template)


def pin_date(template: str, date: str, source: str) -> str:
    """The template with what `strftime_now` says on `date` (ISO 8601) in the place of its calls.

    Raises:
      UserError: a call whose format is not written out.
    """
    midnight = datetime.datetime.combine(datetime.date.fromisoformat(date), datetime.time())
    pinned = _DATE.sub(lambda call: call[1] + midnight.strftime(call[2]) + call[1], template)
    if re.search(r"strftime_now\s*\(", pinned):
        raise UserError(
            f"{source}: the chat template calls strftime_now with something else than a quoted format; set "
            "data.chat_template to a copy of it with a date written out"
        )
    return pinned


class Chosen(NamedTuple):
    """The template of a run."""

    source: str  # Jinja; it does not guard messages yet (`control.guard`)
    note: str = ""  # what a user is told of it, in a line


def choose_template(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str,
    date: str,
    thinking: Thinking = "auto",
    stops: Collection[int] = (),
) -> Chosen:
    """See the module's docstring.

    Args:
      chat_template, thinking: of the config.
      date: for templates that ask for it.
      stops: ids that end a reply, as the backbone's directory says.

    Raises:
      UserError: no such file, no markers in it, a template that cannot be given any, or one that does not end.
    """
    if chat_template != "auto":
        path = Path(chat_template)
        if not path.is_file():
            raise UserError(f"data.chat_template: {path} does not exist; give `auto` or a Jinja file")
        try:
            template = unguarded(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not a readable text file ({error}); give a Jinja file in UTF-8") from error
        if not _MARKER.search(template):
            raise UserError(f"{path}: no {{% generation %}} ... {{% endgeneration %}} markers around assistant turns")
        return Chosen(try_out(tokenizer, pin_date(template, date, str(path)), str(path)))
    name = tokenizer.name_or_path
    if tokenizer.chat_template is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"{name}: the tokenizer has neither a chat template nor an EOS token to end a turn "
                "with; add eos_token to tokenizer_config.json or set data.chat_template"
            )
        return Chosen(PLAIN.read_text(encoding="utf-8"))
    try:
        original = unguarded(tokenizer.get_chat_template())
    except ValueError as error:
        raise UserError(
            f"{name}: several chat templates and none called default; set data.chat_template to one"
        ) from error
    original = try_out(tokenizer, pin_date(original, date, name), name)
    if original.startswith(_OURS) and _MARKER.search(original):  # of an export
        return Chosen(original)
    if thinking != "auto":
        steady = _steady(tokenizer, original, thinking, stops)
        if steady is not None and steady.thinks and _works(tokenizer, steady):
            return Chosen(steady.source, f"{name}: chat template: {steady.note} (data.thinking={thinking})")
        if thinking == "full":
            raise UserError(f"{name}: data.thinking=full, but its chat template shows no thoughts; leave it at auto")
    if _MARKER.search(original):
        return Chosen(original)
    wrapped = add_markers(original)
    fault = _fault(tokenizer, wrapped, original)
    steady = _steady(tokenizer, original, "empty", stops)
    if steady is not None and (steady.late or fault is not None) and _works(tokenizer, steady):
        return Chosen(steady.source, f"{name}: chat template: {steady.note} (data.thinking=auto)")
    if fault is not None:
        raise UserError(
            f"{name}: the chat template has no generation markers and cannot be given any ({fault}); set "
            "data.chat_template to a copy of it with {% generation %} ... {% endgeneration %} around assistant turns"
        )
    return Chosen(wrapped)


def _steady(
    tokenizer: PreTrainedTokenizerBase, original: str, thinking: Thinking, stops: Collection[int]
) -> Steady | None:
    """None where it cannot be made."""
    try:
        return make_steady(tokenizer, _MARKERS.sub(r"{#\1 \2#}", original), thinking, stops)
    except Exception:  # whatever a template may raise
        return None


def _works(tokenizer: PreTrainedTokenizerBase, steady: Steady) -> bool:
    try:
        return _marks(tokenizer, steady.source)
    except Exception:  # whatever a template may raise
        return False


def _fault(tokenizer: PreTrainedTokenizerBase, wrapped: str, original: str) -> str | None:
    """Why `add_markers` does not do; None where it does."""
    try:
        same = _render(tokenizer, wrapped) == _render(tokenizer, original)
        return None if same and _marks(tokenizer, wrapped) else "it would render differently with them"
    except Exception as error:  # whatever a template may raise
        return reason(error)


def try_out(tokenizer: PreTrainedTokenizerBase, template: str, source: str) -> str:
    """Returns the template.

    Raises:
      UserError: it runs for ever or fills the memory.
    """
    fault = bounded.misbehaviour(template, tokenizer.special_tokens_map, _TRIED)
    if fault is not None:
        raise UserError(f"{source}: the chat template {fault}; set data.chat_template to one that works")
    return template


def reason(error: Exception) -> str:
    """Says what a template raised, in one line."""
    text = " ".join(str(error).split())[:200]
    return text if type(error).__name__ == "TemplateError" and text else f"{type(error).__name__}: {text}".rstrip(": ")


def _render(tokenizer: PreTrainedTokenizerBase, template: str) -> Any:
    return tokenizer.apply_chat_template(_PROBE, chat_template=template, tokenize=False)


def _marks(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Tells whether anything is a target."""
    rendered: Any = tokenizer.apply_chat_template(
        _PROBE, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    return any(rendered["assistant_masks"])
