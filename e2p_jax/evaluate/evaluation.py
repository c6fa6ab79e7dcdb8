"""The table of conditions: measures with bootstrap intervals, and paired differences with intervals and tests."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import rich.table
from etils import epath

from e2p_jax.config import Condition, Config, DataConfig, EvaluateConfig
from e2p_jax.data.conditions import FRONTS, spelled_out, user_vectors
from e2p_jax.data.pipeline import PackedDataset
from e2p_jax.datasets.bad_records import BadRecords
from e2p_jax.datasets.prepared import load_splits
from e2p_jax.datasets.records import Record
from e2p_jax.errors import shown
from e2p_jax.evaluate.generate import generate
from e2p_jax.evaluate.items import ALL, Question, is_interactions, named_titles
from e2p_jax.evaluate.measures import (
    MEASURES,
    Difference,
    Share,
    difference,
    distinct,
    interval,
    interval_text,
    p_text,
    share_of,
    text_statistics,
    value_text,
)
from e2p_jax.evaluate.rank import candidate_nll, check_users, rank_statistics, rank_users, ranks, with_candidates
from e2p_jax.files import write_text
from e2p_jax.options import Sampling
from e2p_jax.parallel.distributed import is_first
from e2p_jax.terminal import say
from e2p_jax.train.beyond import BREAKS, Beyond
from e2p_jax.train.metrics import Progress
from e2p_jax.train.run import Run
from e2p_jax.train.score import Arm, Scorer, Scores, pack_conditions
from e2p_jax.train.setup import Inputs
from e2p_jax.vectors.catalogue import Catalogue
from e2p_jax.vectors.population import Population
from e2p_jax.vectors.table import UserTable

BASELINES = ("none", "shuffled")  # what differences are shown to
SHARED = ("e2p", "shuffled", "text", "text+shuffled")  # what the share is of
REPLY = Sampling(max_new_tokens=32)
_BLOCK = 4096  # vectors compared at once
_LONGEST_WORD = 32  # bytes on average: words of any language that has spaces between them are shorter


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores of one split's records under several conditions."""

    split: str
    records: list[Record]
    scores: dict[str, Scores]
    dropped_messages: int
    bootstrap_samples: int
    recommenders: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    """Statistics by measure of what ranks the same candidates without a language model."""
    notes: tuple[str, ...] = ()
    """What is to be known before a row is believed (`notes_on`)."""

    @property
    def users(self) -> list[str]:
        """Of the records."""
        return [record.user_id for record in self.records]

    def difference(self, condition: str, baseline: str, measure: str = "nll_per_target") -> Difference | None:
        """Condition minus baseline; None where one of the two was not measured so."""
        both = [self.scores[name].statistics.get(measure) for name in (condition, baseline)]
        if both[0] is None or both[1] is None:
            return None
        return difference(measure, both[0], both[1], self.users, self.bootstrap_samples)

    def share(self) -> Share | None:
        """What the soft token carries of what the persona is worth to this backbone as text, each compared with another
        user's; None where one of the four conditions was not asked for.
        """
        if not set(SHARED) <= set(self.scores):
            return None
        e2p, shuffled, text, other = (self.scores[name].statistics["nll_per_target"] for name in SHARED)
        return share_of((e2p, shuffled), (text, other), self.users, self.bootstrap_samples)

    def beyond(self) -> dict[str, Beyond]:
        """What a token costs user by user beyond none, by condition with slots; nothing where `none` was not scored."""
        return {
            name: Beyond.of(scores, self.scores["none"], self.users)
            for name, scores in self.scores.items()
            if "none" in self.scores and FRONTS.get(cast(Condition, name), FRONTS["none"]).vector
        }

    def to_dict(self) -> dict[str, Any]:
        """Gives what `--json` prints."""
        share = self.share()
        any_scores = next(iter(self.scores.values()))
        return {
            "split": self.split,
            "records": len(self.records),
            "users": len(set(self.users)),
            "targets": int(any_scores.targets.sum()),
            "words": int(any_scores.words.sum()),
            "dropped_messages": self.dropped_messages,
            "notes": list(self.notes),
            "conditions": {name: self._condition(name) for name in self.scores},
            "recommenders": {name: self._recommender(by) for name, by in self.recommenders.items()},
            "beyond_none": {name: found.to_dict() for name, found in self.beyond().items()},
            "share": share and {name: part and part._asdict() for name, part in share._asdict().items()},
        }

    def _recommender(self, by_measure: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
        """Every measure with its interval, and how much better or worse each condition is."""
        out = {}
        for measure, statistics in by_measure.items():
            entry: dict[str, Any] = interval(measure, statistics, self.users, self.bootstrap_samples)._asdict()
            for name, scores in self.scores.items():
                if (ours := scores.statistics.get(measure)) is not None:
                    apart = difference(measure, ours, statistics, self.users, self.bootstrap_samples)
                    entry[f"{name}_minus"] = dataclasses.asdict(apart)
            out[measure] = entry
        return out

    def _condition(self, name: str) -> dict[str, Any]:
        """NLL, perplexity and differences by name; every measure again, with intervals, under `measures`."""
        scores = self.scores[name]
        measures: dict[str, dict[str, Any]] = {}
        for measure, statistics in scores.statistics.items():
            measures[measure] = interval(measure, statistics, self.users, self.bootstrap_samples)._asdict()
            for baseline in BASELINES:
                if baseline in self.scores and baseline != name:
                    apart = self.difference(name, baseline, measure)
                    measures[measure] |= {f"minus_{baseline}": dataclasses.asdict(apart)} if apart else {}
        for n in (1, 2) if scores.replies else ():
            measures[f"distinct{n}"] = {"value": distinct(scores.replies, n)}
        nll = measures["nll_per_target"]
        differences = {key: value for key, value in nll.items() if key.startswith("minus_")}
        short = {"nll_per_target": nll["value"], "word_perplexity": measures["word_perplexity"]["value"]}
        return {**short, **differences, "measures": measures}

    def per_example(self) -> str:
        """JSON Lines: one line per record and condition, in input order."""
        lines = []
        for condition, scores in self.scores.items():
            for record, nll, targets in zip(self.records, scores.nll, scores.targets, strict=True):
                values = {"user_id": record.user_id, "nll": float(nll), "target_tokens": int(targets)}
                lines.append(json.dumps({**values, "condition": condition, "split": self.split}) + "\n")
        return "".join(lines)


def evaluate(run: Run, records: Sequence[Record], split_name: str, conditions: Sequence[Condition]) -> Evaluation:
    """Scores records under each condition, with one compiled step for all of them, and takes `evaluate.measures`.

    Raises:
      UserError: a user without a vector, a record that cannot fit, or too few to rank among: before anything is scored.
    """
    inputs = run.inputs
    most = inputs.config.evaluate.derangements
    packed, kept, dropped = pack_conditions(records, conditions, inputs.encoder, inputs.table, run.population, most)
    places, measured = _measured(inputs.config.evaluate, kept, conditions)
    scorer = Scorer(run)
    drawn: dict[Condition, list[Scores]] = {condition: [] for condition in conditions}
    progress = Progress(len(packed), 0, f"evaluate {split_name}")
    for number, ((condition, draw), dataset) in enumerate(packed.items(), 1):
        drawn[condition].append(scorer.scores(dataset, kept))
        progress.update(number, f"{condition} {draw + 1}" if draw else condition, show=True)
    progress.close()
    scores: dict[str, Scores] = {
        condition: dataclasses.replace(each[0], drawn=np.concatenate([one.drawn for one in each]))
        for condition, each in drawn.items()
    }
    scores = _measure(run, scorer, places, measured, scores, conditions)
    if "items" in inputs.config.evaluate.measures:
        scores = _rank_items(run, scorer, packed, kept, scores)
    samples = inputs.config.evaluate.bootstrap_samples
    ranked = rank_without(inputs.config, inputs.table, inputs.catalogue, kept)
    return Evaluation(
        split_name, kept, scores, dropped, samples, ranked, notes_on(inputs.config, kept, conditions, inputs.table)
    )


def notes_on(
    config: Config, records: Sequence[Record], conditions: Sequence[Condition], table: UserTable | None = None
) -> tuple[str, ...]:
    """Says of records, scored by a run of this config, which rows of the table are not what their names promise.

    Args:
      table: of the users' vectors.
    """
    notes, trained = [], config.data.condition
    spelled = [name for name in conditions if FRONTS[name].context]
    if spelled and (bare := sum(not record.context for record in records)):
        said = f"{bare} of {len(records)} conversations have no `context`, and nothing is spelled out for them"
        notes.append(f"{', '.join(spelled)}: {said}")
    users = [name for name in conditions if FRONTS[name].reads_table]
    if users and FRONTS[trained].vector != "own":
        notes.append(f"{', '.join(users)}: trained under data.condition={trained}, on no users' vectors")
    if "shuffled" in conditions and table is not None and (same := _the_same(records, table)):
        notes.append(
            f"shuffled: in {same} of {len(records)} conversations the other user's vector is the same as one's own "
            "(users share one, or have none), and the difference to it says too little"
        )
    if config.data.targets == "all":
        notes.append(
            "data.targets=all: text in front is a target, too, and PPL per word counts the words of replies alone"
        )
    measures = [name for name in config.evaluate.measures if name != "items"]
    if measures and not any(map(_replied, records)):
        notes.append(f"{', '.join(measures)}: not measured, no conversation ends with a reply in text")
    if len({record.user_id for record in records}) == 1:
        notes.append("one user alone: intervals and p values say nothing")
    words = sum(record.reply_words for record in records)
    if (long := sum(record.reply_bytes for record in records) / max(words, 1)) > _LONGEST_WORD:
        notes.append(
            f"PPL per word: a word of the replies has {long:.0f} bytes, as of a language without spaces between words; "
            "compare bits per byte"
        )
    return tuple(notes)


def _the_same(records: Sequence[Record], table: UserTable) -> int:
    """How many records `shuffled` leaves with the vector that they have, in its first draw."""
    standard, same = Population.standard(table.width), 0
    own, others = (user_vectors(records, condition, table, standard) for condition in ("e2p", "shuffled"))
    for first in range(0, len(own), _BLOCK):
        a, b = (vectors.gather(slice(first, first + _BLOCK)) for vectors in (own, others))
        same += int(np.all((a == b) | np.isnan(a) & np.isnan(b), axis=1).sum())
    return same


def _rank_items(
    run: Run, scorer: Scorer, packed: Mapping[Arm, PackedDataset], records: Sequence[Record], scores: dict[str, Scores]
) -> dict[str, Scores]:
    """Adds what the head over items ranks, every derangement apart."""
    config, catalogue = run.inputs.config, run.inputs.catalogue
    places = _asked(config.evaluate, records, _names_items)
    if catalogue is None or not len(places):
        return scores
    question = Question(config.data.path, [records[n] for n in places], catalogue)
    rows, in_catalogue = scorer.item_rows(), catalogue.rows(question.ids)
    drawn: dict[str, list[dict[str, np.ndarray]]] = {}
    progress = Progress(len(packed), 0, "rank items")
    for number, ((condition, draw), dataset) in enumerate(packed.items(), 1):
        found = question.of_head(scorer.item_queries(dataset)[places], rows, in_catalogue)
        drawn.setdefault(condition, []).append(_spread(found, places, len(records)))
        progress.update(number, f"{condition} {draw + 1}" if draw else condition, show=True)
    progress.close()
    more = {
        name: {measure: np.stack([found[measure] for found in each]) for measure in each[0]}
        for name, each in drawn.items()
    }
    return {n: dataclasses.replace(s, more=s.more | more.get(n, {})) for n, s in scores.items()}


def rank_without(
    config: Config, table: UserTable | None, catalogue: Catalogue | None, records: Sequence[Record]
) -> dict[str, dict[str, np.ndarray]]:
    """Statistics of the recommenders, where items are ranked and the data is of interactions."""
    measures = config.evaluate.measures
    if not {"ranking", "items"} & set(measures) or not is_interactions(config.data.path):
        return {}
    places = _asked(config.evaluate, records, _replied if "ranking" in measures else _names_items)
    if not len(places):
        return {}
    out = {}
    question = Question(config.data.path, [records[n] for n in places], catalogue)
    for name, found in question.recommenders(table).items():
        among_all = {measure: values for measure, values in found.items() if measure.startswith(ALL)}
        candidates = {measure: values for measure, values in found.items() if measure not in among_all}
        shown = candidates if "ranking" in measures else {}
        if "items" in measures:  # the same, beside those of the head
            shown |= {f"item_{measure}": values for measure, values in candidates.items()}
        out[name] = _spread(shown | among_all, places, len(records))
    return out


def _names_items(record: Record) -> bool:
    return bool(record.items)


def _replied(record: Record) -> bool:
    """Whether a record ends with a reply in text."""
    return record.messages[-1]["role"] == "assistant" and bool(record.messages[-1]["content"])


def _asked(
    settings: EvaluateConfig, records: Sequence[Record], fits: Callable[[Record], bool] = _replied
) -> np.ndarray:
    """Numbers of the records that `measures` take: those that fit, `max_records` at most."""
    last = np.array([n for n, record in enumerate(records) if fits(record)], int)
    if settings.max_records and len(last) > settings.max_records:
        last = last[np.linspace(0, len(last) - 1, settings.max_records).round().astype(int)]
    return last


def _spread(statistics: dict[str, np.ndarray], places: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Statistics of the records at `places` -> of all: records that were not asked add nothing."""
    out = {}
    for name, values in statistics.items():
        out[name] = np.zeros((count, values.shape[1]))
        out[name][places] = values
    return out


def _measured(
    settings: EvaluateConfig, records: Sequence[Record], conditions: Sequence[Condition]
) -> tuple[np.ndarray, list[Record]]:
    """Numbers of the records that `measures` but `items` take, and these records, with candidates to be ranked.

    Raises:
      UserError: there are too few replies or users to rank among, or a record's candidates are wrong.
    """
    places = _asked(settings, records)
    chosen = [records[n] for n in places]
    if "ranking" in settings.measures:
        chosen = with_candidates(chosen, settings.candidates)
    if "users" in settings.measures and chosen and any(FRONTS[name].vector == "own" for name in conditions):
        check_users(chosen, settings.candidates)
    return places, chosen


def _measure(
    run: Run,
    scorer: Scorer,
    places: np.ndarray,
    chosen: list[Record],
    scores: dict[str, Scores],
    conditions: Sequence[Condition],
) -> dict[str, Scores]:
    """Adds `evaluate.measures` of the `chosen` records, which stand at `places` and end with an assistant turn."""
    settings, path = run.inputs.config.evaluate, run.inputs.config.data.path
    if not settings.measures or not chosen:
        return scores
    more: dict[str, dict[str, np.ndarray]] = {condition: {} for condition in conditions}
    replies: dict[str, tuple[str, ...]] = dict.fromkeys(conditions, ())
    if "ranking" in settings.measures:
        question = Question(path, chosen) if is_interactions(path) else None
        for condition, nll in candidate_nll(run, chosen, conditions).items():
            likely = [-row[~np.isnan(row)] for row in nll]
            more[condition] |= question.measure("", likely) if question else rank_statistics(ranks(nll))
    for condition in conditions:
        if "users" in settings.measures and FRONTS[condition].vector == "own":
            rank = rank_users(run, scorer, chosen, condition, settings.candidates)
            one = np.ones(len(rank))
            more[condition] |= {"user_rank": np.stack([rank, one], 1), "user_first": np.stack([rank == 1, one], 1)}
        if "texts" in settings.measures:
            vectors = run.vectors(chosen, condition).gather()
            prompts = [dataclasses.replace(record, messages=record.messages[:-1]) for record in chosen]
            made = generate(run, prompts, vectors, condition, REPLY)
            replies[condition] = tuple(map(run.inputs.encoder.answer, made))
            more[condition] |= text_statistics(replies[condition], chosen)
            if is_interactions(path):
                more[condition] |= named_titles(path, replies[condition], chosen)
    return {
        c: dataclasses.replace(s, more=_spread(more[c], places, len(s.targets)), replies=replies[c])
        for c, s in scores.items()
    }


def read_splits(data: DataConfig, splits: Sequence[str]) -> dict[str, list[Record]]:
    """The splits that there are; says on stderr how many bad records were skipped.

    Raises:
      UserError: the first split is absent, or a record is at fault.
    """
    bad = BadRecords(data.on_bad_record, data.max_bad_share, "--data.on_bad_record")
    found = load_splits(data.path, splits, bad)
    if (skipped := bad.report()) and is_first():
        say(skipped)
    return found


def check_reported(conditions: Sequence[Condition], inputs: Inputs, reported: Mapping[str, Sequence[Record]]) -> None:
    """Refuses before training what `evaluate` would refuse after it.

    Args:
      reported: records by split.

    Raises:
      UserError: a user without a vector, or too few users or replies for a condition or a measure.
    """
    for records in reported.values() if conditions else ():
        for condition in conditions:
            spelled_out(records, condition)
            user_vectors(records, condition, inputs.table, Population.standard(1))
        _measured(inputs.config.evaluate, records, conditions)


def evaluate_splits(run: Run, splits: Sequence[str], conditions: Sequence[Condition]) -> list[Evaluation]:
    """`evaluate` on every split of the run's data that there is; none where no condition is asked for.

    Raises:
      UserError: the first split is absent, or a record or vector is at fault.
    """
    if not conditions:
        return []
    found = read_splits(run.inputs.config.data, splits)
    return [evaluate(run, records, name, conditions) for name, records in found.items()]


def render(evaluation: Evaluation) -> list[rich.table.Table]:
    """The tables people read: NLL with differences, and the further measures where there are such."""
    values = evaluation.to_dict()
    size = f"{values['records']} conversations of {values['users']} users, {values['targets']:,} targets"
    table = rich.table.Table(title=f"{evaluation.split}: {size}", title_justify="left", caption_justify="left")
    table.caption = (
        "differences in nats per target, below zero is better; "
        "95 % paired bootstrap over users, paired permutation test"
    )
    if values["beyond_none"]:
        table.caption += f"\n{worst_text(values['beyond_none'])}"
    if values["share"]:
        table.caption += f"\n{share_text(values['share'])}"
    table.caption += "".join(f"\nnote: {note}" for note in values["notes"])
    table.add_column("condition")
    for column in ("NLL per target", "PPL per word", "minus none", "p", "minus shuffled", "p"):
        table.add_column(column, justify="right")

    for name, row in values["conditions"].items():
        differences = [text for baseline in BASELINES for text in _cells(row.get(f"minus_{baseline}"))]
        numbers = (value_text(measure, {"value": row[measure]}) for measure in ("nll_per_target", "word_perplexity"))
        table.add_row(name, *numbers, *differences)
    return [table, *_further(values)]


def render_seeds(by_seed: Mapping[int, Evaluation]) -> rich.table.Table:
    """One split's NLL per target, and its difference to `shuffled`, seed by seed."""
    split = next(iter(by_seed.values())).split
    table = rich.table.Table(title=f"{split}: NLL per target (nats), minus shuffled, by seed", title_justify="left")
    table.add_column("condition")
    rows: dict[str, list[str]] = {}
    for seed, evaluation in by_seed.items():
        table.add_column(str(seed), justify="right")
        for name, row in evaluation.to_dict()["conditions"].items():
            rows.setdefault(name, []).append(f"{row['nll_per_target']:.4f} {_cells(row.get('minus_shuffled'))[0]}")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def worst_text(beyond: dict[str, dict[str, Any]]) -> str:
    """Whom a token costs most, by condition, in one sentence; of `Evaluation.to_dict`."""
    said = []
    for name, found in beyond.items():
        user, broken = found["worst"][0], f", {found['broken']} above {BREAKS}" if found["broken"] else ""
        said.append(f"{name} {user['nats']:+.4f} ({shown(user['user_id'])}{broken})")
    breaks = f" (more than {BREAKS} breaks the model)" if any(found["broken"] for found in beyond.values()) else ""
    return f"worst user, nats per target beyond none{breaks}: {', '.join(said)}"


def share_text(entry: dict[str, dict[str, float] | None]) -> str:
    """The share of `Evaluation.to_dict`, in one sentence."""
    gain, whole = ("{value:.4f} [{low:.4f}, {high:.4f}]".format(**entry[name] or {}) for name in ("gain", "whole"))
    parts = f"e2p is {gain} nats per target better than shuffled, text {whole} better than text+shuffled"
    if entry["share"] is None:
        return f"no share: {parts}, which is not told from nothing"
    share, low, high = (f"{100 * entry['share'][name]:.0f} %" for name in ("value", "low", "high"))
    return f"the soft token carries {share} [{low}, {high}] of what the persona is worth as text: {parts}"


def _cells(entry: dict[str, float] | None) -> tuple[str, str]:
    """A difference with its interval, and p."""
    if entry is None:
        return "", ""
    return f"{entry['mean']:+.4f} [{entry['low']:+.4f}, {entry['high']:+.4f}]", p_text(entry["p"], entry["p_least"])


def _further(values: dict[str, Any]) -> list[rich.table.Table]:
    rows = {name: row["measures"] for name, row in values["conditions"].items()} | values["recommenders"]
    shown = {"nll_per_target": 0, "word_perplexity": 0, **{m: 0 for row in rows.values() for m in row}}
    names = [name for name in shown if name not in ("nll_per_target", "word_perplexity")]
    if names == ["bits_per_byte"]:
        return []
    table = rich.table.Table(title=f"{values['split']}: further measures, 95 % interval", title_justify="left")
    table.add_column("measure")
    for condition in rows:
        table.add_column(condition, justify="right")
    for name in names:
        cells = [f"{value_text(name, row.get(name))} {interval_text(name, row.get(name))}" for row in rows.values()]
        table.add_row(MEASURES[name].label, *map(str.strip, cells))
    return [table]


def save(run: Run, evaluations: Sequence[Evaluation]) -> epath.Path:
    """Writes `report/evaluation.json`."""
    path = run.directory / "report" / "evaluation.json"
    values = {"checkpoint": run.step, "splits": [evaluation.to_dict() for evaluation in evaluations]}
    write_text(path, json.dumps(values, indent=2) + "\n")
    return path
