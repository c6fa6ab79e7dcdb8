"""`e2p report`: its numbers, and its page in a real browser at two widths, light and dark."""

import csv
import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from e2p_jax.cli import main
from e2p_jax.config import Condition
from e2p_jax.embed.make import make_table
from e2p_jax.errors import UserError
from e2p_jax.evaluate.cost import Training, training_cost
from e2p_jax.evaluate.evaluation import Evaluation, evaluate_splits, save
from e2p_jax.evaluate.users import _nearest_tokens
from e2p_jax.options import EncoderSettings
from e2p_jax.report import collect as collect_lib
from e2p_jax.report import report as report_lib
from e2p_jax.report.collect import Collected, _open, collect, find_source, named
from e2p_jax.report.report import write_report
from e2p_jax.terminal import printable
from e2p_jax.train.run import Run, open_run

CONDITIONS: tuple[Condition, ...] = ("none", "shuffled", "e2p", "text", "text+shuffled")


@pytest.fixture(scope="module")
def collected() -> list[Collected]:
    """What `report` has collected."""
    return []


@pytest.fixture(scope="module")
def table(learned_run: Path) -> Evaluation:
    """What the report is made of."""
    run = open_run(learned_run)
    (table,) = evaluate_splits(run, ["all"], CONDITIONS)
    one = np.ones((len(table.records), 2))
    table = dataclasses.replace(table, recommenders={"popularity": {"hits@10": one}})
    save(run, [table])
    return table


@pytest.fixture(scope="module")
def report(
    learned_run: Path, table: Evaluation, tmp_path_factory: pytest.TempPathFactory, collected: list[Collected]
) -> Path:
    out = tmp_path_factory.mktemp("reports") / "report"

    def collect_and_keep(paths: Any) -> Collected:
        collected.append(collect(paths))
        return collected[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_lib, "collect", collect_and_keep)
        assert main(["report", str(learned_run), "--out", str(out)]) == 0
    return out


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_numbers_are_those_of_the_run(report: Path, table: Evaluation, learned_run: Path):
    run = open_run(learned_run)
    (evaluation,) = evaluate_splits(run, ["all"], ["none", "e2p"])  # without the text nothing is too long
    found = {(row["condition"], row["measure"]): row for row in rows(report / "conditions.csv")}
    assert float(found["e2p", "nll_per_target"]["value"]) == pytest.approx(table.scores["e2p"].per_target)
    assert float(found["e2p", "nll_per_target"]["minus_none_mean"]) < 0
    assert float(found["popularity", "hits@10"]["value"]) == 100
    robust = {(row["disturbance"], float(row["level"])): float(row["nll"]) for row in rows(report / "robustness.csv")}
    assert robust["as trained", 0.0] == pytest.approx(evaluation.scores["e2p"].per_target, rel=1e-4)
    shares = {row["part"]: row for row in rows(report / "share.csv")}
    assert float(shares["gain"]["value"]) == pytest.approx(
        -float(found["e2p", "nll_per_target"]["minus_shuffled_mean"])
    )
    share = table.share()
    assert share is not None and float(shares["whole"]["low"]) == pytest.approx(share.whole.low)
    users = rows(report / "beyond.csv")
    named = [(row["condition"], row["user_id"]) for row in users if row["user_id"]]
    worst = {name: beyond.worst(1)[0][0] for name, beyond in table.beyond().items()}
    assert set(worst) == {"e2p", "shuffled"} and set(worst.items()) <= set(named)
    assert sum(row["percentile"] != "" for row in users) == 2 * 101
    costs = {row["condition"]: float(row["prompt_tokens"]) for row in rows(report / "cost.csv")}
    assert costs["e2p"] == costs["none"] + 1 and costs["text"] > costs["e2p"] + 10
    users, answers = rows(report / "users.csv"), rows(report / "answers.csv")
    assert len(users) == 24 and len({(row["x"], row["y"]) for row in users}) == 24
    assert len(answers) == 5 and len({row["user_id"] for row in answers}) == 5  # four users, and without a prefix
    assert len({row["answer"] for row in answers}) > 1  # users learned by heart answer differently
    assert [float(row["step"]) for row in rows(report / "learning.csv")] == [50, 100, 150, 200]


def test_of_several_runs_one_backbone_is_loaded(
    learned_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[bool] = []

    def noted(run: Run) -> Training:
        loaded.append(any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(run.model.params["backbone"])))
        return training_cost(run)

    monkeypatch.setattr(collect_lib, "training_cost", noted)
    shutil.copytree(learned_run, tmp_path / "copy")
    run, trained = _open({"run": epath.Path(learned_run), "copy": epath.Path(tmp_path / "copy")}, "run")
    assert loaded == [True, False] and trained["copy"] == trained["run"] == training_cost(run)


def test_the_nearest_words_are_those_of_any_soft_token_of_a_user(learned_run: Path):
    """By direction: a long token that is near to no word does not hide a short one that is a word."""
    run = open_run(learned_run)
    words = np.asarray(run.model.merged.backbone.embed(np.arange(run.inputs.decoder.vocab_size)[None])[0])
    (dog,) = run.inputs.encoder.tokenizer(" dog", add_special_tokens=False)["input_ids"]
    mean = words.mean(axis=0)
    far = 100 * np.random.default_rng(0).normal(size=len(mean)).astype(np.float32)
    soft = np.stack([mean + far, mean + 0.1 * (words[dog] - mean)])[None]
    assert _nearest_tokens(run, soft)[0][0] == "dog"


def test_page_is_whole_by_itself(report: Path):
    page = (report / "index.html").read_text()
    assert not re.search(r"(?:src|href)=\"(?!#)", page) and "@import" not in page and "url(http" not in page
    assert page.count("<svg") == 8  # two of differences, share, what users pay, learning, robustness, cost, users
    assert "worst user, nats per target beyond none" in page and "e2p is" in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    pictures = {path.name for path in report.glob("*.png")}
    assert {
        "share-0.png",
        "beyond-0.png",
        "learning.png",
        "robustness.png",
        "cost.png",
        "users.png",
        "conditions-0-none.png",
    } <= pictures


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_in_a_browser(report: Path, browser: Any, width: int, scheme: str):
    """Nothing is wider than the window, text stands out from its background, and nothing is fetched."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get((report / "index.html").as_uri())
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    shade = """
      const rgb = text => text.match(/[0-9.]+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 3;
      const of = (element, what) => rgb(getComputedStyle(element)[what]);
      return [of(document.body, 'backgroundColor'), of(document.querySelector('td'), 'color'),
              of(document.querySelector('figure svg text'), 'fill')];
    """
    back, text, figure = browser.execute_script(shade)
    assert (back > 200) == (scheme == "light")
    assert abs(text - back) > 120 and abs(figure - back) > 120
    narrow = "return [...document.querySelectorAll('figure svg')].every(s => s.getBoundingClientRect().width > 250)"
    assert browser.execute_script(narrow)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


ACTIVE = (
    '<img src=x onerror="window.owned=1"><script>window.owned=1</script></svg>"\'>\x1b[2J\u202e$x^{$ {{ 7*7 }} \ud800'
)
FORMULAS = ['=HYPERLINK("http://x/")', "+1", "-2+3", "@SUM(A1)", "\t=1", " =1", "\r=1", "＝1"]


@pytest.fixture
def hostile(report: Path, collected: list[Collected], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The report with names, ids, contexts, words and answers that want to be more than text."""
    found = collected[0]
    records = [dataclasses.replace(r, user_id=f"{ACTIVE} {i}") for i, r in enumerate(found.users.records)]
    for i, text in enumerate(FORMULAS):
        records[i] = dataclasses.replace(records[i], user_id=text, context=(text, "x" * 50_000))
    nearest = [["$x^{$", ACTIVE, "日本"] for _ in records]
    users = dataclasses.replace(found.users, records=records, nearest=nearest)
    person = dataclasses.replace(
        found.people[0], user_id=ACTIVE, context=(ACTIVE, "x" * 50_000), nearest=[ACTIVE], answers=[ACTIVE]
    )
    long = dataclasses.replace(person, user_id="y" * 50_000, answers=["=1+1" + "z" * 50_000])
    (split,) = found.sources[0].splits
    beyond = {"e2p": {"percentiles": [0.0] * 101, "broken": 1, "worst": [{"user_id": ACTIVE, "nats": 0.5}]}}
    beyond["e2p"]["worst"].append({"user_id": "=1+1" + "z" * 50_000, "nats": 0.1})
    source = dataclasses.replace(found.sources[0], name=ACTIVE, splits=[split | {"beyond_none": beyond}])
    changed = dataclasses.replace(
        found,
        sources=[source],
        learning={f"_{ACTIVE}": next(iter(found.learning.values()))},
        run=ACTIVE,
        trained={ACTIVE: found.trained[found.run]},
        users=users,
        prompts=(ACTIVE,),
        people=[person, long],
        without=[ACTIVE],
    )
    changed.trained.setdefault(changed.run, found.trained[found.run])
    monkeypatch.setattr(report_lib, "collect", lambda _: changed)
    return report_lib.write_report([], tmp_path / "hostile")


def test_text_stays_text(hostile: Path, browser: Any):
    browser.get(hostile.as_uri())
    run = browser.execute_script
    shown = printable(ACTIVE)  # what turns text around would turn the page's own words around, too
    assert run("return window.owned") is None and run("return document.querySelectorAll('img, script').length") == 0
    assert run("return document.querySelector('.people h3').textContent") == shown
    assert run("return document.querySelector('h1').textContent") == shown
    assert run("return document.querySelectorAll('figure svg').length") == 8
    words = "return [...document.querySelectorAll('figure svg')].map(e => e.textContent).join()"
    assert "$x^{$" in run(words) and "_<img src=x" in run(words)
    assert run("return document.documentElement.scrollWidth <= innerWidth")
    assert len(hostile.read_text()) < 2_000_000
    browser.set_window_size(1280, run("return document.documentElement.scrollHeight"))
    browser.save_screenshot(str(hostile.parent / "report.png"))
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_no_cell_is_a_formula(hostile: Path):
    for path in hostile.parent.glob("*.csv"):
        for row in rows(path):
            for cell in row.values():
                assert not re.match(r"[\s]*[=+@＝-]", cell) or re.fullmatch(r"-?[0-9.]+(e-?\d+)?", cell), (path, cell)
    ids = [row["user_id"] for row in rows(hostile.parent / "users.csv")]
    assert ids[: len(FORMULAS)] == [f"'{text}" for text in FORMULAS]
    assert rows(hostile.parent / "users.csv")[0]["context"].endswith("x" * 50_000)  # the page cuts, the files do not


def test_refusals(learned_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 1
    assert "neither a run directory nor one that `e2p compare` made" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    asked_nothing = tmp_path / "asked-nothing" / "report" / "evaluation.json"
    asked_nothing.parent.mkdir(parents=True)
    asked_nothing.write_text('{"splits": []}')
    shutil.copy(learned_run / "config.json", tmp_path / "asked-nothing")
    assert main(["report", str(tmp_path / "asked-nothing"), "--out", str(tmp_path / "out")]) == 1
    assert f"e2p: {asked_nothing}: holds no conditions; rerun the command that made it" in capsys.readouterr().err


def test_runs_of_one_name_are_told_apart(tmp_path: Path):
    """By as much of their paths as it takes; one that is named twice is there once."""
    a, b, other = tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "b" / "other"
    for place in (a, b, other):
        place.mkdir(parents=True)
    assert list(named([a, b, other, a / ".." / "run"]).items()) == [("a/run", a), ("b/run", b), ("b/other", other)]
    assert list(named([str(a)])) == ["run"]
    (a / "config.json").touch()
    (a / "report").mkdir()
    (a / "report" / "evaluation.json").write_text('{"splits": [{"cond')
    with pytest.raises(UserError, match=r"evaluation.json: line 1: malformed JSON .* rerun the command that made it"):
        find_source(a, "a/run")


def test_a_place_with_other_files_is_refused_before_the_work(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(UserError, match=r"out: holds other files \(precious\)"):
        write_report([tmp_path / "no run"], tmp_path / "out")
    with pytest.raises(UserError, match=r"out: holds other files \(precious\)"):
        make_table("no data", "backbone", tmp_path / "out", EncoderSettings())
