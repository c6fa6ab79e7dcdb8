"""Metadata -> `tokenizer.json` and `tokenizer_config.json`.

Two kinds of vocabulary are known: `gpt2`, byte-level BPE with its merges, and `llama`, SentencePiece's BPE with scores,
of which merges are made. What splits text before the merges is not in a file but named there; an unknown name is an
error, as the model would read other tokens than it was trained on.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from e2p_jax.backbone.gguf.file import GgufFile
from e2p_jax.errors import UserError

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # of `token_type`; all others are ordinary
_SPACE = "▁"  # of SentencePiece

# Regular expressions of the published tokenizers: how text is split, by llama.cpp's name of a group of models.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+END|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*END"
_CASED_TAIL = _TAIL.replace("[\\r\\n]*", "[\\r\\n/]*", 1)
_TEKKEN = _CASED.replace("END", "") + r"|\p{N}" + _CASED_TAIL
_GPT4O = _CASED.replace("END", f"{_CONTRACTIONS}?") + r"|\p{N}{1,3}" + _CASED_TAIL
_SPLITS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("glm4", "chatglm-bpe"), _LLAMA3),
    "seed-coder": _QWEN2.replace(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}\r\n]+"),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
}
_PLAIN = ("gpt-2", "phi-2", "olmo", "exaone4")  # GPT-2's own, which `tokenizers` has
_DIGITS = ("smollm", "starcoder", "refact", "command-r")  # the same, each digit by itself before
# A piece of text that is in the vocabulary is one token, whatever the merges would make of it.
_WHOLE = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")


def write_tokenizer(file: GgufFile, out: Path) -> None:
    """Writes both files into `out`.

    Raises:
      UserError: a vocabulary of another kind, or text split in a way that is not known.
    """
    kind = file.text("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise _refusal(file, f"a tokenizer of kind {kind[:60]!r}")
    tokens = _list(file, "tokens", str)
    types = _list(file, "token_type", int, [1] * len(tokens))
    if len(types) != len(tokens):
        raise _refusal(file, f"a tokenizer of {len(tokens)} tokens and {len(types)} types of them")
    named = {name: _named(file, theirs, tokens) for name, theirs in _NAMED.items()}
    vocab = {t: i for i, (t, of) in enumerate(zip(tokens, types, strict=True)) if of != _UNUSED or not _padding(t)}
    tokenizer = _byte_level(file, vocab) if kind == "gpt2" else _sentence_piece(file, vocab, types, named["unk_token"])
    added = [
        AddedToken(token, normalized=False, special=of == _CONTROL)
        for token, of in zip(tokens, types, strict=True)
        if of in (_CONTROL, _USER_DEFINED) and not (of == _USER_DEFINED and _blank(token, kind))
    ]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    front = _front(file, kind, named["bos_token"], tokens)
    if front:
        token, place = front
        tokenizer.post_processor = processors.Sequence([  # keeps ByteLevel's offsets beside the token in front
            *([processors.ByteLevel(trim_offsets=False)] if kind == "gpt2" else []),
            processors.TemplateProcessing(
                single=f"{token}:0 $A:0", pair=f"{token}:0 $A:0 {token}:1 $B:1", special_tokens=[(token, place)]
            ),
        ])  # fmt: skip
    tokenizer.save(str(out / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{name: token for name, token in named.items() if token is not None},
    }
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    if isinstance(length := file.metadata.get(f"{file.text('general.architecture')}.context_length"), int):
        settings["model_max_length"] = length
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (out / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _refusal(file: GgufFile, what: str) -> UserError:
    return UserError(
        f"{file.path}: {what} is not supported; run `e2p convert` on the model's own Hugging Face directory instead"
    )


def _list(file: GgufFile, name: str, kind: type, default: list[Any] | None = None) -> list[Any]:
    value = file.metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, list) or any(type(item) is not kind for item in value):
        raise _refusal(file, f"a tokenizer without {name}")
    return value


def _named(file: GgufFile, name: str, tokens: list[str]) -> str | None:
    place = file.token(name)
    return tokens[place] if place is not None and place < len(tokens) else None


def _padding(token: str) -> bool:
    """Tells what fills a vocabulary up to the embedding's rows: no text becomes one."""
    return token.startswith("[PAD") and token[4:-1].isdigit()


def _blank(token: str, kind: str) -> bool:
    """Tells a run of spaces: SentencePiece's merges make it, as they do in the published tokenizers of Gemma."""
    return kind == "llama" and not token.strip(" ")


def _front(file: GgufFile, kind: str, bos: str | None, tokens: list[str]) -> tuple[str, int] | None:
    """The token in front of every text, where the file asks for one; older ones leave it to the kind."""
    default = kind == "llama" or file.metadata.get("tokenizer.ggml.pre") in _WHOLE
    wanted = file.metadata.get("tokenizer.ggml.add_bos_token", default)
    return (bos, tokens.index(bos)) if wanted and bos is not None else None


def _byte_level(file: GgufFile, vocab: dict[str, int]) -> Tokenizer:
    pre = file.metadata.get("tokenizer.ggml.pre", "default")
    if pre not in (*_SPLITS, *_PLAIN, *_DIGITS):
        raise _refusal(file, f"text split as in {str(pre)[:60]!r} (tokenizer.ggml.pre)")
    merges = [tuple(merge.split(" ")) for merge in _list(file, "merges", str)]
    if odd := next((pair for pair in merges if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys()), None):
        raise _refusal(file, f"a merge {' '.join(odd)[:60]!r} that is none of the vocabulary's")
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in _WHOLE))
    first: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre in _DIGITS else []
    if pre in _SPLITS:
        first = [pre_tokenizers.Split(Regex(_SPLITS[pre]), "isolated")]
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=pre not in _SPLITS)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, whole])
    if _SPLITS.get(pre) == _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(file: GgufFile, vocab: dict[str, int], types: list[int], unknown: str | None) -> Tokenizer:
    """As the published tokenizers of Llama 2 (a space in front of text) and Gemma (none)."""
    scores = _list(file, "scores", float)
    if len(scores) != len(types):
        raise _refusal(file, f"a tokenizer of {len(types)} tokens and {len(scores)} scores of them")
    spelled = {t.replace(" ", _SPACE) if _blank(t, "llama") else t: i for t, i in vocab.items()}
    merges = _merges(spelled, scores, types)
    tokenizer = Tokenizer(models.BPE(spelled, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaced = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend(_SPACE)] if spaced else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    last = [decoders.Strip(" ", 1, 0)] if spaced else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    return tokenizer


def _merges(vocab: dict[str, int], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, the best token first: what SentencePiece does from the scores alone.

    User-defined tokens have no score that counts; they keep their place in the vocabulary, where Gemma's stand in the
    order of their merges.
    """
    found = []
    for token, place in vocab.items():
        if types[place] not in (_CONTROL, 2, 6):
            rank = (1, 0.0) if types[place] == _USER_DEFINED else (2, -scores[place])
            pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
            known = sorted((vocab[a], vocab[b], a, b) for a, b in pairs if a in vocab and b in vocab)
            found += [(*rank, place, *pair) for pair in known]
    found.sort()
    return [(a, b) for *_, a, b in found]
