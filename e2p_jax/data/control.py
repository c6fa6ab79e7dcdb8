"""Control tokens, and the part of a template that keeps the text of messages from becoming one.

An added token of a tokenizer is a control token if

1. it is special, has one of the tokenizer's names (BOS, EOS, padding, ...), or ends a reply; or
2. it has two characters or more, is not white space, and either looks like markup (begins with one of `<[{|` and ends
   with one of `>]}|`) or is written by the chat template and is more than words (letters, digits, white space).

So runs of spaces and line breaks, and words that somebody added, are text like any other. Where a message holds the
text of a control token, that text is broken after its first character, by a space where the tokenizer keeps spaces. A
control token of one character becomes U+FFFD. This is done in Jinja, in front of the template, so that it goes wherever
the template goes; text that holds no control token is rendered as ever.
"""

import itertools
import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from e2p_jax.errors import UserError

Pairs = Sequence[tuple[str, str]]  # a control token's text, and what stands in its place
Groups = Sequence[tuple[str, Pairs]]  # what all control tokens of a group begin with, and their pairs

_BREAKS = (" ", "\u200b", "\u2060")  # a space; zero width space; word joiner
_REPLACEMENT = "\ufffd"
_MARKUP = re.compile(r"[<\[{|].*[>\]}|]", re.DOTALL)
_WORDS = re.compile(r"[\w\s]*")
_GROUP = 64  # control tokens; Gemma 3 has 6,500, which nobody can look for one by one in every text

_BEGIN, _END = "{#- Text stays text (e2p). -#}\n", "{#- The template. #}\n"
# Every tag strips what stands before it, and the last leaves alone what the template begins with.
# HELD tells in one look whether there is anything to do, which there hardly ever is.
_PRELUDE = """\
{%- macro e2p_text(text) -%}
    {%- set e2p = namespace(text=text) -%}
    {%- for begin, pairs in CONTROLS if begin in text -%}
        {%- for control, plain in pairs if control in text -%}
            ACTION
        {%- endfor -%}
    {%- endfor -%}
    {{- e2p.text -}}
{%- endmacro -%}
{%- macro e2p_clean(value, out) -%}
    {%- if value is string -%}
        {%- set out.value = e2p_text(value) | string -%}
    {%- elif value is mapping -%}
        {%- set held, fields = namespace(value=none), namespace(all={}) -%}
        {%- for name, part in value.items() -%}
            {{- e2p_clean(part, held) -}}
            {%- set fields.all = dict(fields.all, **{e2p_text(name) | string: held.value}) -%}
        {%- endfor -%}
        {%- set out.value = fields.all -%}
    {%- elif value is sequence -%}
        {%- set held, parts = namespace(value=none), namespace(all=[]) -%}
        {%- for part in value -%}
            {{- e2p_clean(part, held) -}}
            {%- set parts.all = parts.all + [held.value] -%}
        {%- endfor -%}
        {%- set out.value = parts.all -%}
    {%- else -%}
        {%- set out.value = value -%}
    {%- endif -%}
{%- endmacro -%}
{%- set e2p_all = messages | string ~ (tools | string if tools else '') -%}
{%- if HELD -%}
    {%- set e2p = namespace(value=none) -%}
    {{- e2p_clean(messages, e2p) -}}
    {%- set messages = e2p.value -%}
    {%- if tools -%}
        {{- e2p_clean(tools, e2p) -}}
        {%- set tools = e2p.value -%}
    {%- endif -%}
{%- endif -%}
"""
_ACTIONS = {
    "break": "{%- set e2p.text = e2p.text | replace(control, plain) -%}",
    "refuse": "{{- raise_exception('a message holds the text of the control token ' ~ control) -}}",
}


def control_tokens(
    tokenizer: PreTrainedTokenizerBase, template: str, written: Collection[int], stops: Collection[int]
) -> dict[str, int]:
    """Text -> id of every control token, by the rule above.

    Args:
      template: its text is searched for added tokens.
      written: ids that the template writes around messages.
      stops: ids that end a reply.
    """
    named = {*tokenizer.all_special_tokens, *(getattr(tokenizer, "chat_control_tokens", None) or ())}
    found = {}
    for number, token in tokenizer.added_tokens_decoder.items():
        text = token.content
        certain = token.special or text in named or number in stops
        is_candidate = len(text) > 1 and not text.isspace()
        markup = _MARKUP.fullmatch(text.strip()) is not None
        used = (number in written or text in template) and _WORDS.fullmatch(text) is None
        if text and (certain or (is_candidate and (markup or used))):
            found[text] = number
    return found


def counted(tokenizer: PreTrainedTokenizerBase, controls: dict[str, int]) -> set[int]:
    """The ids of `controls` that no text gives: all but the unknown token's, which any text may give."""
    return set(controls.values()) - {tokenizer.unk_token_id}


def break_up(tokenizer: PreTrainedTokenizerBase, controls: dict[str, int]) -> Groups:
    """Finds what to put in place of each control token's text, in this order, tried on the tokenizer.

    Raises:
      UserError: a control token that cannot be kept out of text.
    """
    stubborn = ""
    for between in _BREAKS:
        groups = _grouped([pair for text in sorted(controls) for pair in _broken(text, between)])
        stubborn = _survivor(tokenizer, groups, controls, controls)
        if not stubborn:
            break
    else:
        raise UserError(
            f"{tokenizer.name_or_path}: text that holds {stubborn!r} cannot be kept from becoming that control token; "
            "rename the token in tokenizer.json"
        )
    if tokenizer.backend_tokenizer.normalizer is not None:
        added = {token.content: token.normalized for token in tokenizer.added_tokens_decoder.values()}
        variants = {form: text for text in controls if added.get(text) for form in _forms(text)}
        if form := _survivor(tokenizer, groups, controls, variants):
            raise UserError(
                f"{tokenizer.name_or_path}: the tokenizer's normaliser makes the control token {variants[form]!r} of "
                f"other text ({form!r}); set its `normalized` to false in tokenizer.json"
            )
    return groups


def as_text(text: str, groups: Groups) -> str:
    """Does to a message's text what the Jinja part of a template does."""
    plain_text = text
    for begin, pairs in groups:
        if begin in text:
            for control, plain in pairs:
                if control in text:
                    plain_text = plain_text.replace(control, plain)
    return plain_text


def guard(template: str, groups: Groups, policy: str, front: str = "") -> str:
    """The template with the part in front that breaks up or refuses control tokens in messages and tools.

    Args:
      policy: `break` or `refuse`.
      front: what else goes in front of the template, after that.
    """
    prelude = _PRELUDE.replace("ACTION", _ACTIONS[policy]).replace("CONTROLS", _literal(groups))
    prelude = prelude.replace("HELD", _held(groups))
    return _BEGIN + prelude + front + _END + template


def _held(groups: Groups) -> str:
    """A condition that holds wherever a message holds a control token's text, whose first characters stand as they are
    where Python writes the messages; but for those written as escapes there, with which every conversation is gone
    through.
    """
    begins = sorted({control[:3] for _, pairs in groups for control, _ in pairs})
    if not all(begin.isprintable() and not {"\\", "'", '"'} & set(begin) for begin in begins):
        return "true"
    # No chain of `or`: Python nests it.
    return f"{_literal(begins)} | select('in', e2p_all) | first is defined"


def unguarded(template: str) -> str:
    """The template without that part, if it has it."""
    return template.split(_END, 1)[-1] if template.startswith(_BEGIN) else template


def _literal(value: str | Sequence) -> str:
    """In Jinja; tuples all the way down, which Python makes once and not at every look."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return f"({''.join(f'{_literal(part)}, ' for part in value)})"


def _grouped(pairs: Pairs, length: int = 1) -> Groups:
    """Pairs, sorted by control token, by what these begin with: `_GROUP` together at the most."""
    groups: list[tuple[str, Pairs]] = []
    for begin, members in itertools.groupby(pairs, key=lambda pair: pair[0][:length]):
        some = list(members)
        if len(some) <= _GROUP or all(len(control) <= length for control, _ in some):
            groups.append((begin, some))
        else:
            groups.extend(_grouped(some, length + 1))
    return groups


def _broken(text: str, between: str) -> Pairs:
    if len(text) == 1:
        return [(text, _REPLACEMENT)]
    if any(text.startswith(text[start:]) for start in range(1, len(text))):
        # It may overlap itself: broken between all characters, a second pass finds what overlapped the first's.
        return [(text, between.join(text))] * 2
    return [(text, text[0] + between + text[1:])]


def _survivor(
    tokenizer: PreTrainedTokenizerBase, groups: Groups, controls: dict[str, int], texts: Iterable[str]
) -> str:
    """One of the texts that is still read as a control token after it was broken up; empty if none is."""
    forbidden = counted(tokenizer, controls)
    around = [as_text(f"{text} {text}{text} a{text}b  {text} ", groups) for text in texts]
    encoded = tokenizer.backend_tokenizer.encode_batch(around, add_special_tokens=False)
    held = (text for text, encoding in zip(texts, encoded, strict=True) if not forbidden.isdisjoint(encoding.ids))
    return next(held, "")


def _forms(text: str) -> set[str]:
    """Other ways to write it that normalisers are known to undo."""
    wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)
    cased = {text.upper(), text.lower(), text.title()}
    return {*cased, wide, *(unicodedata.normalize(form, text) for form in ("NFD", "NFKC"))} - {text}
