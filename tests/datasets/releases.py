"""Small releases of every dataset, made up here in the true formats, with all that makes those formats hard."""

import csv
import json
from pathlib import Path

import numpy as np

PENS_NEWS = "News ID\tCategory\tTopic\tHeadline\tNews body\tTitle entity\tEntity content"
PENS_CLICKS = "UserID\tClicknewsID\tdwelltime\texposure_time\tpos\tneg\tstart\tend\tdwelltime_pos"
PENS_REWRITES = "userid\tclicknewsID\tposnewID\trewrite_titles"


def pens(directory: Path) -> Path:
    """CRLF and a byte order mark in news.tsv; quotes well-formed, stray and around a tab; ids that no news has."""
    news = [
        'N1\tsports\tsoccer\tCup final ends level\tThe  cup final ended level.\t{"Cup": "Cup"}\t{}',
        'N2\tnews\tworld\t"The ""big"" vote"\tA vote\u2028was held.\t{}\t{}',
        'N3\tnews\tlocal\t"Cheap" flats, again\t"Flats are cheap" he said.\t{}\t{}',
        'N4\tfood\trecipes\t"Soup\tin a minute"\tSoup needs a minute.\t{}\t{}',
        "N5\tfood\trecipes\t\tThis article has no headline.\t{}\t{}",
        "N6\ttravel\ttrains\tNight trains return\t\t{}\t{}",
        'N7\ttv\tshows\tQuizmaster "retires\tA quizmaster retires.\t{}\t{}',
        "N8\tsports\ttennis\tCafé owner wins open\tAn amateur won.\t{}\t{}",
    ]
    train = [
        "U1\tN1 N99 N2\t5 3 8\t6/19/2019 5:10:01 AM#TAB#6/19/2019 5:11:01 AM#TAB#6/20/2019 1:00:00 PM\tN3 N7\tN4 N8"
        "\t7/3/2019 6:43:49 AM\t7/3/2019 7:06:06 AM\t34 83",
        "U2\tN98\t5\t6/19/2019 5:10:01 AM\tN1\tN2\t7/3/2019 6:43:49 AM\t7/3/2019 7:06:06 AM\t34",  # no known history
        "U3\tN4 N5\t5 1\t6/1/2019 5:10:01 AM#TAB#6/2/2019 5:10:01 AM\tN5 N6 N97 N8\tN2\t7/3/2019 6:43:49 AM"
        "\t7/3/2019 7:06:06 AM\t1 2 3 4",
        "U1\tN1 N2 N3\t5 3 8\t#TAB##TAB#\tN1 N4\t\t7/4/2019 6:43:49 AM\t7/4/2019 7:06:06 AM\t3 8",
    ]
    valid = ["U1\tN3\t5\tx\tN8\tN4\t7/5/2019 6:43:49 AM\t7/5/2019 7:06:06 AM\t3",
             "U4\tN8\t5\tx\tN3\tN4\t7/5/2019 6:43:49 AM\t7/5/2019 7:06:06 AM\t3"]  # fmt: skip
    test = [
        "NT1\tN1,N2,N99\tN3,N4,N5\tCheap flats: again;;Minute soup;;No headline",
        'NT2\tN4, N8\tN1,N2,N7\t"Level\tcup ""final"";;;;Quiz ends"',  # a raw tab inside quotes, an empty title
        "NT3\tN8\tN2,N99\tVotes counted;;Lost;;",
    ]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "news.tsv").write_bytes(("\r\n".join([PENS_NEWS, *news]) + "\r\n").encode("utf-8-sig"))
    for name, header, rows in (
        ("train.tsv", PENS_CLICKS, train),
        ("valid.tsv", PENS_CLICKS, valid),
        ("personalized_test.tsv", PENS_REWRITES, test),
    ):
        (directory / name).write_text("\n".join([header, *rows]) + "\n", encoding="utf-8", newline="")
    return directory


def movielens(directory: Path) -> Path:
    """MovieLens 100k: Latin-1 titles, CRLF in the ratings, users in no order."""
    rng = np.random.default_rng(0)
    directory.mkdir(parents=True, exist_ok=True)
    pairs = [(user, item) for user in range(1, 9) for item in rng.permutation(40)[: 6 + user] + 1]
    rows = [f"{user}\t{item}\t{rng.integers(1, 6)}\t{880_000_000 + rng.integers(10**7)}" for user, item in pairs]
    (directory / "u.data").write_bytes("".join(f"{row}\r\n" for row in rng.permutation(rows)).encode())
    dates = "|01-Jan-1995||http://x|" + "|".join("0" * 19)
    titles = [f'{item}|Die "Brücke" {item % 35} (1995){dates}\n' for item in range(1, 41)]
    (directory / "u.item").write_bytes("".join(titles).encode("latin-1"))
    return directory


def persona_chat(directory: Path) -> Path:
    """All forms: ParlAI's text (a Windows editor's in one part), both JSON exports, the CSV of generated dialogues."""
    directory.mkdir(parents=True, exist_ok=True)

    def dialogue(name: str, number: int) -> str:
        lines = [f"your persona: i am {name}.", f"partner's persona: i know {name}."]
        for partner, reply in ((f"hello {number}", f"hi , i am {name}"), ("a café ?", f"yes {name}")):
            lines.append(f"{partner}\t{reply}\t\tno|{reply}|never")
        return "".join(f"{row} {line}\n" for row, line in enumerate(lines, 1))

    parts = {"train": ["ann", "bob", "ann", "cid"], "valid": ["dan", "eve"], "test": ["fay"]}
    for whose in ("self", "other", "both"):
        for wording in ("original", "revised"):
            for part, names in parts.items():
                text = "".join(dialogue(f"{name} {wording}", number) for number, name in enumerate(names))
                windows = text.replace("\n", "\r\n").encode("utf-8-sig")
                (directory / f"{part}_{whose}_{wording}.txt").write_bytes(windows if part == "valid" else text.encode())

    utterances = [
        {"candidates": ["no", "ho"], "history": ["hi"]},
        {"candidates": ["x", "yes"], "history": ["hi", "ho", "a"]},
    ]
    entries = [{"personality": [f"i am {n}."], "utterances": utterances} for n in range(4)]
    (directory / "personachat_self_original.json").write_text(json.dumps({"train": entries[:3], "valid": entries[3:]}))

    said = [{"text": text, "sender_class": who} for who, text in (("Bot", "hi"), ("Human", "ho"), ("Bot", "so ?"))]
    evaluation = [{"dialog": said, "user_profile": [f"i am {n}."], "bot_profile": ["i am a bot."]} for n in range(6)]
    (directory / "data_intermediate.json").write_text(json.dumps(evaluation))

    columns = ("user 1 personas", "user 2 personas", "Best Generated Conversation")
    talk = 'User 1: Hi, "you"\nUser 2: Ho\nUser 1: So\nmore'
    for part, people in (("train", ("gus", "hal")), ("valid", ("ida",)), ("test", ("joe",))):
        rows = [(f"I am {name}.\nI ski.", f"I know {name}.", talk) for name in people]
        with (directory / f"Synthetic-Persona-Chat_{part}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
    return directory


def own_log(directory: Path) -> Path:
    """One's own log as CSV, with times in both forms."""
    rng = np.random.default_rng(1)
    directory.mkdir(parents=True, exist_ok=True)
    times = [f"2024-01-{1 + n % 28:02d}T10:00:00Z" if n % 2 else f"{1_704_000_000 + n * 9_000}" for n in range(120)]
    rows = [f'"u{rng.integers(6)}",i{rng.integers(25)},{rng.integers(1, 9)},{time}' for time in times]
    (directory / "interactions.csv").write_text("\n".join(["user,item,weight,time", *rows]) + "\n")
    titles = [f'i{n},"Part {n}, ""the"" end"' for n in range(25)]
    (directory / "items.csv").write_text("\r\n".join(["item,title", *titles]) + "\r\n")
    return directory


def lastfm(directory: Path) -> Path:
    """HetRec 2011's Last.fm, which has no times."""
    rng = np.random.default_rng(2)
    directory.mkdir(parents=True, exist_ok=True)
    rows = [f"{user}\t{item}\t{rng.integers(1, 9999)}" for user in range(2, 8) for item in rng.permutation(30)[:9]]
    (directory / "user_artists.dat").write_text("\r\n".join(["userID\tartistID\tweight", *rows]) + "\r\n")
    artists = [f'{n}\t"Weird {n}" Björk\thttp://a\thttp://b' for n in range(30)]
    (directory / "artists.dat").write_text("\n".join(["id\tname\turl\tpictureURL", *artists]) + "\n", "utf-8")
    return directory


JSONL = """\
{"user_id": "Zoë", "context": ["i ski."], "messages": [{"role": "user", "content": "hi"},
 {"role": "assistant", "content": "ho"}, {"role": "user", "content": "so?"}], "split": "test"}
{"user_id": 7, "prompt": "hi", "response": "ho \\ud83d\\ude00", "candidates": ["ho", "no"], "references": ["ho"]}
""".replace("\n ", " ").encode()

TEXT = [f"{whose}_{wording}" for whose in ("self", "other", "both") for wording in ("original", "revised")]
EXPECTED: dict[str, tuple[str, str, list[str], dict[str, int]]] = {
    # name -> data set, release, configurations, examples by split
    "PensTest": ("pens", "pens", ["headlines"], {"train": 3, "validation": 2, "test": 5}),
    "InteractionsTest": ("interactions", "movielens", ["leave_last_out"], {"train": 34, "validation": 8, "test": 8}),
    "PersonaChatTest": (
        "persona_chat",
        "persona_chat",
        TEXT,
        {"train": 3, "validation": 2, "test": 1, "validation_seen": 1, "validation_ranking": 4},
    ),
    "PersonaChatBareTest": (
        "persona_chat",
        "persona_chat",
        [f"{name}_no_cands" for name in TEXT],
        {"train": 3, "validation": 2, "test": 1, "validation_seen": 1},
    ),
    "PersonaChatJsonTest": (
        "persona_chat",
        "persona_chat",
        ["convai2_json"],
        {"train": 3, "validation": 1, "validation_ranking": 2},
    ),
    "PersonaChatEvaluationTest": (
        "persona_chat",
        "persona_chat",
        ["convai2_evaluation"],
        {"train": 4, "validation": 2},
    ),
    "SyntheticPersonaTest": (
        "persona_chat",
        "persona_chat",
        ["synthetic"],
        {"train": 4, "validation": 2, "test": 2},
    ),
}
