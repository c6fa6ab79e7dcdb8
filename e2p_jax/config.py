"""The configuration: frozen dataclasses, one per section.

A config file is Python that defines `config = Config(...)`. Every field can be overridden on the command
line as `--section.field value`. Each says what it does to a run's result: `result`, `rounding` or `free`.
"""

import dataclasses
import importlib.util
import json
import os.path
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from e2p_jax.config_fields import NOT_NEGATIVE, POSITIVE, SHARE, checks, fault_of, free, result, rounding, time_limit
from e2p_jax.config_versions import moved_field, upgraded
from e2p_jax.errors import UsageError, UserError
from e2p_jax.json_files import parse_object
from e2p_jax.registry import ADAPTERS, KINDS, PROJECTORS, load_plugins, one_of, plugins_of

Condition = Literal[
    "none", "e2p", "text", "e2p+text", "static", "shuffled", "text+shuffled", "mean", "zero", "noise", "extreme"
]
Measures = Literal["ranking", "users", "texts", "items"]
Placement = Literal["after_bos", "before_bos", "in_chat", "before_reply"]
Thinking = Literal["auto", "none", "empty", "full"]
OnBadRecord = Literal["error", "skip"]
ProjectorKind = Annotated[str, one_of(PROJECTORS)]
STARTS = ("random", "words")  # of a projector; another is a run directory
AdapterKind = Annotated[str, one_of(ADAPTERS)]
LOAD_SECONDS = 60  # that a config file may run


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """The frozen LLM."""

    path: str = free("embedded")
    """Hugging Face model directory, GGUF file, hub id (`org/model`), or `embedded`: the small model in the package. A
    run knows its backbone by what it holds, wherever it lies."""
    revision: str | None = free(None)
    """Branch, tag or commit, when `path` is a hub id."""
    dtype: Literal["auto", "float32", "bfloat16"] = result("auto")
    """Of the frozen weights and the activations; auto: bfloat16 on accelerators, float32 on CPU."""
    quantization: Literal["none", "int8", "int4", "nf4"] = result("none")
    """Of the layers' matrices, which stay frozen: int8 with a scale a row, int4 and nf4 with one for each 64 inputs."""
    ignored_keys: tuple[str, ...] = free(())
    """Keys of the backbone's config.json that are unknown here and refused, but that you know to change nothing."""
    weights: Literal["pretrained", "random"] = result("pretrained")
    """random: only config.json and the tokenizer are read, to train a small backbone from nothing."""
    remat: bool = rounding(False)
    """Recompute each layer in the backward pass instead of keeping what its products gave."""
    attention: Literal["auto", "xla", "splash", "cudnn", "mosaic"] = rounding("auto")
    """Training's kernel: auto is splash on TPU; on NVIDIA, from Hopper on, cudnn, or mosaic (tokamax) where scores have
    a soft cap; XLA elsewhere."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Records, user vectors, and how they become rows."""

    path: str = free("synthetic")
    """A prepared dataset's directory, a JSON Lines file, or `synthetic`: the generated personas. A run knows its data
    and vectors by what they hold, wherever they lie."""
    embeddings: str | None = free(None)
    """Table of user vectors: a table directory, .npz, .parquet, or .npy with ids beside it."""
    items: str | None = free(None)
    """Table of item vectors by item id (a title's embedding, a collaborative factor, or both in one): the catalogue
    that `items` of records name, whose items are tokens of an output vocabulary of their own. auto: the table that
    stands beside `embeddings` by the same name with `-items` behind, if there is one."""
    missing_user: Literal["error", "null"] = result("error")
    """A user who is not in the table is an error, or the null user (needs `train.null_user_rate`)."""
    cache: str = free("auto")
    """Directory for tokenised data, so that the next start need not tokenise; auto: a folder of the user's cache; or
    none."""
    train_split: str = result("train")
    """Split to train on. In a JSON Lines file every record without a `split` key is `train`."""
    eval_splits: tuple[str, ...] = result(("validation",))
    """Splits to evaluate, reported apart."""
    dev_split: str = result("auto")
    """Split that picks the best checkpoint and is not reported; auto: one training user in twenty, kept out of
    training, of those whom no reported split has."""
    seq_len: int = result(512)
    """T: tokens per row, slots included; a multiple of 128."""
    condition: Condition = result("e2p")
    """What training puts in front of the conversation; `none` when backbone or adapters are trained by themselves."""
    targets: Literal["assistant", "all"] = result("assistant")
    """assistant: the template's generation spans; all: every token of the conversation."""
    on_bad_record: OnBadRecord = result("error")
    """The first malformed record of a JSON Lines file is an error, or such records are skipped and counted."""
    max_bad_share: float = free(0.01, SHARE)
    """Skipping more than this share of a file's records is an error."""
    too_long: Literal["drop_oldest", "refuse"] = result("drop_oldest")
    """A conversation longer than T loses its oldest turns, or is an error."""
    chat_template: str = free("auto")
    """auto: the tokenizer's own, else the plain one; or the path of a Jinja file with generation markers."""
    thinking: Thinking = result("auto")
    """Of a backbone that thinks before it replies: replies without a thinking block (none), after an empty one (empty),
    or with the thoughts that records give as `reasoning_content` (full), in training and generation alike. auto: as its
    chat template has it, or empty where that shows the last reply otherwise than those before."""
    control_text: Literal["break", "refuse"] = result("break")
    """What a message that spells out a control token (`<|end|>`) is, in training, generation and exports. break: text,
    with the token broken up (`< |end|>`); refuse: an error."""
    template_date: str = result("2024-07-26")
    """What a chat template that asks for today's date is told (ISO 8601), so that no day changes the tokens."""
    context_prompt: str = result("{context}")
    """System message of the `text` condition; `{context}` becomes the record's context, one sentence a line."""


@dataclasses.dataclass(frozen=True)
class ItemsConfig:
    """The head over `data.items`, read where a record's last reply begins. `items/**` trains beside what
    `train.trainable` names.
    """

    width: int = result(64, POSITIVE)
    """Of an item's row, and of the query that it is multiplied with."""
    negatives: int = result(16384, POSITIVE)
    """A larger catalogue's softmax is over a user's items and so many others, drawn anew each step and weighed for it;
    a smaller one's is whole."""
    text_weight: float = result(0.0, NOT_NEGATIVE)
    """Of the replies' own loss, nats per target, beside the items', nats per conversation; 0 trains items alone."""
    token: bool = result(False)
    """The item stands as a token of its own in front of the last reply, so that words follow it: in training a record's
    first item, in generation the one that the head picks."""


@dataclasses.dataclass(frozen=True)
class PrefixConfig:
    """Where the soft tokens stand."""

    placement: Placement = result("after_bos")
    """after_bos: after the conversation's first token, which is BOS where the template begins with one; before_bos: in
    front of everything; in_chat: inside the first user turn; before_reply: in front of every reply, so that all before
    the first one is the same for every user."""


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    """User vector -> soft tokens. A kind has fields of its own beside these, in its own file."""

    kind: ProjectorKind = result("mlp")
    """One of `registry.PROJECTORS`."""
    num_tokens: int = result(1, POSITIVE)
    """K: soft tokens per user."""
    shared_tokens: int = result(0, NOT_NEGATIVE)
    """How many of them, the last ones, are learned as they are and the same for everybody (prompt tuning), so that the
    others are free to say what tells users apart."""
    noise: float = result(0.0, NOT_NEGATIVE)
    """Standard deviation of normal noise on training vectors, in units of the training users' spread."""
    start: str = result("random")
    """Before training: random; words, a linear guess at the words of the records' `context` (their embeddings, rare
    ones above all), each soft token at its share of the texts; or a run directory, whose projector it goes on with (the
    checkpoint of the lowest dev NLL), on other data or with another part of it trained. Where no user's vector stands
    in front it is random."""
    init_scale: float = result(1.0, POSITIVE)
    """Root mean square of the first soft tokens, in units of the backbone's token embeddings."""
    max_scale: float = result(4.0, NOT_NEGATIVE)
    """What a soft token's root mean square is held to, in the same units, whatever the user vector; 0 is no bound."""

    @property
    def own_tokens(self) -> int:
        """Soft tokens that are made from the user's vector."""
        return self.num_tokens - self.shared_tokens


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Small parameters beside the backbone's matrices."""

    kind: AdapterKind = result("none")
    """One of `registry.ADAPTERS`; its parameters are `KIND/**`."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Optimisation, evaluation during training, and what is kept."""

    trainable: tuple[str, ...] = result(("projector/**",))
    """Parameter path patterns (`*` inside a name, `**` across): what the optimizer may change."""
    steps: int = result(1000, POSITIVE)
    """Updates of the trainable parameters; the learning rate's cosine ends at the last. It may grow when all are done:
    the steps to come have the rates of the new length's cosine, those before keep theirs."""
    rows: int = result(8, POSITIVE)
    """B: rows per step, over all devices."""
    accumulation: int = result(1)
    """Micro-batches per step; divides `rows`. The result is that of one large batch."""
    logits_at_once: int = rounding(0, NOT_NEGATIVE)
    """Logits of the loss that a device holds at a time; 0: as many as a 64th of its memory takes, on a CPU 2^25."""
    learning_rate: float = result(1e-3, POSITIVE)
    """AdamW's, at the end of the warm-up."""
    bias_learning_rate: float = result(0.0, NOT_NEGATIVE)
    """AdamW's of what all users share, a projector's bias and its shared tokens; 0: sqrt(E) times `learning_rate`, E
    as wide as the projector's input."""
    warmup_steps: int = result(50)
    """Steps of linear warm-up from 0."""
    final_learning_rate: float = result(0.1)
    """Where the cosine ends, as a fraction of `learning_rate`."""
    weight_decay: float = result(0.01, NOT_NEGATIVE)
    """AdamW decay of matrices; vectors are not decayed."""
    beta2: float = result(0.98, SHARE)
    """AdamW's decay of the second moment."""
    null_user_rate: float = result(0.0, SHARE)
    """Share of training conversations whose user vector gives way to the null user's, a learned vector that then
    stands for users who have none; 0 learns no null user."""
    clip_norm: float = result(1.0, POSITIVE)
    """Global norm of the trainable gradient."""
    seed: int = result(0, NOT_NEGATIVE)
    """Of the projector's first weights, the order of rows, dropout and noise."""
    eval_every: int = result(100, POSITIVE)
    """Steps between evaluations of the dev NLL."""
    checkpoint_every: int = free(100, POSITIVE)
    """Steps between checkpoints; every evaluation writes one as well."""
    keep_last: int = free(2, POSITIVE)
    """Newest checkpoints that stay: should the last one be damaged, the run resumes from the one before."""
    keep_best: int = free(1, POSITIVE)
    """Checkpoints of the lowest dev NLL that stay beside them."""
    log_every: int = free(10, POSITIVE)
    """Steps between lines of metrics.jsonl and TensorBoard."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one may be -1 and takes what is left."""

    data: int = rounding(-1)
    """Groups of devices with rows of their own and a whole copy of the weights."""
    fsdp: int = rounding(1)
    """Devices that share out rows and weights alike, and gather a layer when they need it."""
    tensor: int = rounding(1)
    """Devices that share out heads, the MLP's width and the vocabulary."""


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What `e2p train` shows when it ends, and `e2p evaluate` by default."""

    conditions: tuple[Condition, ...] = free(("none", "shuffled", "e2p", "text"))
    """What stands in front of the conversation, one column each."""
    measures: tuple[Measures, ...] = free(())
    """Beside likelihood. ranking: the true last reply among candidates; users: the true user among others; texts:
    greedy last replies against the true ones; items: the true item among candidates and among all of `data.items`."""
    derangements: int = free(4, POSITIVE)
    """So many other users, or all there are, everybody meets under `shuffled` and `text+shuffled`, whose mean is shown;
    each costs what another condition costs."""
    candidates: int = free(20)
    """What is ranked among, the true one included: replies, where records bring none, and users."""
    max_records: int = free(200, NOT_NEGATIVE)
    """Records of a split, evenly spaced, that `measures` take; 0 is all. Likelihood takes all."""
    bootstrap_samples: int = free(2000, POSITIVE)
    """Resamples of users behind each 95 % interval."""
    prompts: tuple[str, ...] = free(())
    """Asked of two held-out users after training."""


_SHARED: dict[str, Any] = {"projector": ProjectorConfig, "adapter": AdapterConfig}  # fields that all kinds have


@dataclasses.dataclass(frozen=True)
class Config:
    """A run. A section with a kind becomes one of the kind's own class; given as another, it keeps what all have."""

    backbone: BackboneConfig = BackboneConfig()
    data: DataConfig = DataConfig()
    items: ItemsConfig = ItemsConfig()
    prefix: PrefixConfig = PrefixConfig()
    projector: ProjectorConfig = ProjectorConfig()
    adapter: AdapterConfig = AdapterConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    def __post_init__(self) -> None:
        for name, table in KINDS.items():
            section, shared = getattr(self, name), _SHARED[name]
            if isinstance(section, shared) and isinstance(section.kind, str) and section.kind in table:
                own = table[section.kind].load().Settings
                if type(section) is not own:
                    values = {field.name: getattr(section, field.name) for field in dataclasses.fields(shared)}
                    object.__setattr__(self, name, own(**values))

    def validate(self) -> None:
        """Refuses combinations that cannot run.

        Raises:
          UserError: naming the field and the remedy.
        """
        self.check_types()
        for section, values in vars(self).items():
            for field in dataclasses.fields(values):
                if (span := field.metadata["span"]) and not span.holds(getattr(values, field.name)):
                    raise UserError(f"{section}.{field.name} {span.said}")
        for holds, message in checks(self):
            if not holds:
                raise UserError(message)

    def check_types(self) -> None:
        """Holds every field against its type; neither a config file nor config.json is checked by anything else.

        Raises:
          UserError: a value of another type, none of the choices, or a number that 32 bits cannot hold (nan, inf).
        """
        for section, kind in typing.get_type_hints(Config).items():
            values = getattr(self, section)
            if not isinstance(values, kind):
                raise UserError(f"{section} is {values!r}; it must be a {kind.__name__}")
            for name, field_kind in typing.get_type_hints(type(values), include_extras=True).items():
                given = getattr(values, name)
                if fault := fault_of(given, field_kind):
                    raise UserError(f"{section}.{name} is {given!r}; {fault}")

    def change(self, **sections: dict[str, Any]) -> "Config":
        """The same config with other values of some fields, by section."""
        changed = {name: dataclasses.replace(getattr(self, name), **fields) for name, fields in sections.items()}
        return dataclasses.replace(self, **changed)

    def resolved(self) -> "Config":
        """The same config with local paths made absolute, so that the run can be opened from anywhere."""

        def absolute(path: str) -> str:
            place = Path(path).expanduser()
            return str(place.resolve()) if place.exists() and path not in ("embedded", "synthetic", "auto") else path

        items, beside = self.data.items, f"{self.data.embeddings}-items"
        if items == "auto":
            items = beside if Path(beside).expanduser().is_dir() else None
        return self.change(data={"items": items})._with_paths(absolute)

    def portable(self) -> "Config":
        """The same config with local paths cut to their last part: what an export says of where things came from."""
        return self._with_paths(lambda path: Path(path).name if Path(path).is_absolute() else path)

    def _with_paths(self, change: Callable[[str], str]) -> "Config":
        paths = ("path", "embeddings", "items", "chat_template")
        data = {name: path and change(path) for name in paths for path in [getattr(self.data, name)]}
        start = self.projector.start
        projector = {} if start in STARTS else {"start": change(start)}
        return self.change(backbone={"path": change(self.backbone.path)}, data=data, projector=projector)

    def to_json(self) -> str:
        """As `from_json` reads it, with the plugins that the kinds are of."""
        plugins = plugins_of(table[getattr(self, name).kind] for name, table in KINDS.items())
        return json.dumps(dataclasses.asdict(self) | ({"plugins": plugins} if plugins else {}), indent=2) + "\n"


def from_json(text: str | bytes, source: Path) -> Config:
    """A resolved `config.json` -> `Config`.

    Raises:
      UserError: malformed JSON, an unknown field or a value of the wrong type.
    """
    load_plugins()
    given = parse_object(text, source, "restore the file")
    try:
        sections = upgraded(given)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    plugins = sections.pop("plugins", [])
    for name, table in KINDS.items():
        values = sections.get(name)
        if isinstance(values, dict) and isinstance(kind := values.get("kind"), str) and kind not in table:
            more = f"; the run was made with the plugin {' or '.join(map(str, plugins))}: install it" if plugins else ""
            raise UserError(f"{source}: {name}.kind is {kind!r}; choose from {', '.join(table)}{more}")
    config: Config = _build(Config, sections, source, "")
    try:
        config.check_types()
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return config


def _build(cls: Any, values: Any, source: Path, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{source}: {prefix.removesuffix('.') or 'the file'} must be a JSON object of config fields")
    section, kind = prefix.removesuffix("."), values.get("kind")
    if section in KINDS:
        cls = KINDS[section][kind if isinstance(kind, str) else cls().kind].load().Settings
    fields = typing.get_type_hints(cls)
    unknown = sorted(prefix + name for name in values if name not in fields)
    if unknown:
        raise UserError(f"{source}: unknown config fields {unknown}; this version knows {sorted(fields)}")
    built = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(fields[name]):
            built[name] = _build(fields[name], value, source, f"{prefix}{name}.")
        else:
            built[name] = tuple(value) if isinstance(value, list) else value
    return cls(**built)


def config_directory() -> Path:
    """`configs/`: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).parent
    beside = package.parent / "configs"
    return beside if (beside / "quickstart.py").exists() else package / "configs"


def load_config(name: str) -> tuple[str, Config]:
    """Finds and runs a config file.

    Args:
      name: a name in `configs/` (`persona_chat`, `baselines/lora`), or the path of a Python file or of a run's
        `config.json`.

    Returns:
      The config's short name and the config.

    Raises:
      UsageError: no such config.
      UserError: an error in the file, it does not come to an end, or it defines no `config`.
    """
    load_plugins()
    directory = config_directory()
    path = Path(name) if name.endswith((".py", ".json")) else directory / f"{name}.py"
    if not os.path.isfile(path):  # noqa: PTH113 (pathlib raises for a name that is too long)
        known = sorted(str(p.relative_to(directory).with_suffix("")) for p in directory.rglob("*.py"))
        raise UsageError(f"config {name!r}: {path} does not exist; shipped configs: {', '.join(known)}")
    if path.suffix == ".json":
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 ({error})") from error
        return path.absolute().parent.name, from_json(text, path)
    spec = importlib.util.spec_from_file_location(f"e2p_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # a .py file always has both
    module = importlib.util.module_from_spec(spec)
    try:
        with time_limit(LOAD_SECONDS):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a config file may raise: a misspelt field is a TypeError
        remedy = f"it is {now} now" if (now := moved_field(error)) else "correct the file"
        raise UserError(f"{path}: {type(error).__name__}: {error}; {remedy}") from error
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        raise UserError(f"{path}: must define `config`, a Config, and not {type(config).__name__}")
    return path.stem, config
