"""PENS: what its files hold, and what is asked of whom."""

import dataclasses

import pytest
import releases

from e2p_jax.datasets.bad_records import BadRecords
from e2p_jax.datasets.pens.release import read_news, read_rewrites
from e2p_jax.datasets.prepare import prepare
from e2p_jax.datasets.prepared import load_records
from e2p_jax.errors import UserError

ASK = "Write a headline for this article.\n\n"


@pytest.fixture
def manual(tmp_path):
    return releases.pens(tmp_path / "manual")


def asked(records) -> list[tuple]:
    return [
        (r.user_id, r.context, *(m["content"].removeprefix(ASK) for m in r.messages), r.references) for r in records
    ]


def test_headlines_clicked_and_headlines_written(manual, tmp_path, capsys):
    directory = str(prepare("pens", manual, tmp_path / "data"))
    first = ("Cup final ends level", 'The "big" vote')  # of U1's first impression, for all of U1's
    assert asked(load_records(directory, "train")) == [
        ("U1", first, '"Flats are cheap" he said.', '"Cheap" flats, again', ()),
        ("U3", ("Soup in a minute",), "An amateur won.", "Café owner wins open", ()),
        ("U1", first, "Soup needs a minute.", "Soup in a minute", ()),
    ]
    assert asked(load_records(directory, "validation")) == [
        ("U1", first, "An amateur won.", "Café owner wins open", ()),
        ("U4", ("Café owner wins open",), '"Flats are cheap" he said.', '"Cheap" flats, again', ()),
    ]
    one, two, three = first, ("Soup in a minute", "Café owner wins open"), ("Café owner wins open",)
    written = [
        ("NT1", one, '"Flats are cheap" he said.', "Cheap flats: again"),
        ("NT1", one, "Soup needs a minute.", "Minute soup"),
        ("NT2", two, "The cup final ended level.", 'Level cup "final"'),
        ("NT2", two, "A quizmaster retires.", "Quiz ends"),
        ("NT3", three, "A vote was held.", "Votes counted"),
    ]
    assert asked(load_records(directory, "test")) == [(*row, (row[-1],)) for row in written]
    told = capsys.readouterr().err
    for line in (
        "records: 3 train, 2 validation, 5 test",
        "left out 4 history entries without a headline in news.tsv",
        "left out 1 impressions of users without a known history",
        "left out 1 clicked headlines that the user's history has",
        "left out 5 articles to ask for without a headline and a body in news.tsv",
        "left out 1 empty rewritten headlines",
    ):
        assert line in told


def test_every_option_changes_the_records(manual, tmp_path):
    def made(*options: str) -> list:
        directory = str(prepare("pens", manual, tmp_path / "data", options))
        read = [record for split in ("train", "validation", "test") for record in load_records(directory, split)]
        return [dataclasses.replace(record, source="") for record in read]

    plain = made()
    assert len(made("targets=2")) == len(plain) + 1
    assert {record.context for record in made("context=1") if record.user_id == "U1"} == {
        ('The "big" vote',)
    }  # the last
    assert made("body_words=2")[0].messages[0]["content"] == f'{ASK}"Flats are'
    assert made("question=Headline?")[0].messages[0]["content"].startswith("Headline?\n\n")
    for option in ("targets=0", "context=0", "body_words=0", "question= "):
        with pytest.raises(UserError, match=rf"pens: option {option.partition('=')[0]} must"):
            made(option)


def test_files_without_their_header_line_are_read_alike(manual):
    news = read_news(manual / "news.tsv", 9, BadRecords())
    lines = (manual / "news.tsv").read_bytes().splitlines(keepends=True)
    (manual / "news.tsv").write_bytes(b"".join(lines[1:]))
    assert read_news(manual / "news.tsv", 9, BadRecords()) == news and len(news) == 8


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("news.tsv", "N9\ta\tb\tc\td\te", r"news.tsv:10: 6 columns, expected 7 \(News ID, Category,"),
        ("news.tsv", "\ta\tb\tc\td\te\tf", r"news.tsv:10: column 'News ID' is empty"),
        ("news.tsv", "N1\ta\tb\tc\td\te\tf", r"news.tsv:10: news id 'N1' has another article above"),
        ("train.tsv", "U9\tN1\tN2", r"train.tsv:6: 3 columns, expected 9"),
        ("valid.tsv", " \tN1\t\t\tN2\t\t\t\t", r"valid.tsv:4: column 'UserID' is empty"),
        (
            "personalized_test.tsv",
            "NT9\tN1\tN2\ta;;b",
            r":5: column 'rewrite_titles' has 2 titles, .* for 1 news",
        ),
        ("personalized_test.tsv", "\tN1\tN2\ta", r"personalized_test.tsv:5: column 'userid' is empty"),
    ],
)
def test_a_row_that_breaks_the_format_is_named_or_skipped(manual, tmp_path, capsys, name, row, message):
    with (manual / name).open("a", encoding="utf-8") as file:
        file.write(f"{row}\n")
    with pytest.raises(UserError, match=message):
        prepare("pens", manual, tmp_path / "data")
    assert not list((tmp_path / "data").rglob("dataset_info.json"))
    prepare("pens", manual, tmp_path / "data", bad=BadRecords("skip", 0.4))
    assert "skipped 1 of 18 records as bad" in capsys.readouterr().err


def test_a_part_is_prepared_alone_and_missing_files_are_named(manual, tmp_path):
    whole = load_records(str(prepare("pens", manual, tmp_path / "whole")), "test")
    for name in ("train.tsv", "valid.tsv"):
        (manual / name).unlink()
    directory = str(prepare("pens", manual, tmp_path / "data"))
    assert asked(load_records(directory, "test")) == asked(whole)
    with pytest.raises(UserError, match=r"no split 'train'; there are test$"):
        load_records(directory, "train")
    (manual / "personalized_test.tsv").unlink()
    with pytest.raises(
        UserError, match=r"manual: holds none of train.tsv, valid.tsv, personalized_test.tsv; part of PENS"
    ):
        prepare("pens", manual, tmp_path / "none")
    (manual / "news.tsv").unlink()
    with pytest.raises(UserError, match=r"news.tsv: not found; it has the articles of PENS"):
        prepare("pens", manual, tmp_path / "none")


def test_the_readers_of_the_test_keep_their_own_order(manual):
    readers = list(read_rewrites(manual / "personalized_test.tsv", BadRecords()))
    assert [reader.user_id for reader in readers] == ["NT1", "NT2", "NT3"]
    assert readers[1].rewrites == [("N1", 'Level cup "final"'), ("N2", ""), ("N7", "Quiz ends")]
