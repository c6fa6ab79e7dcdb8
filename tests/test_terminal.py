"""Text of data in tables and messages: shown as it is, and unable to act."""

import io

import pytest
import rich.table
import rich.text

from e2p_jax.terminal import LONGEST, Console, printable, say

ACTIVE = "[/red] [bold]x :smile: \x1b[2J\x9b31m\x07\r\u202eabc\u2066\ud800"
SHOWN = r"[/red] [bold]x :smile: \x1b[2J\x9b31m\x07\r\u202eabc\u2066\ud800"


def test_text_in_tables_is_text() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, color_system=None)
    table = rich.table.Table(title=ACTIVE)
    table.add_column(ACTIVE)
    table.add_row(ACTIVE)
    console.print(table, rich.text.Text(ACTIVE.replace("\x07", "").replace("\r", "")))
    lines = out.getvalue().splitlines()
    assert sum(SHOWN in line for line in lines) == 3 and not set("\x1b\x9b\x07\r\u202e\ud800") & set(out.getvalue())
    assert (
        len({len(line) for line in lines if line.startswith(("┏", "┃", "│", "└"))}) == 1
    )  # cells have the width shown


def test_what_people_write_stays() -> None:
    text = "naïve 日本語 👩\u200d👩\u200d👧 עברית\ttab\nline"
    assert printable(text, lines=True) == text
    assert printable(text) == text.replace("\t", r"\t").replace("\n", r"\n")


def test_a_message_is_one_line_of_bounded_length(capsys: pytest.CaptureFixture[str]) -> None:
    say("first\nsecond\x1b[31m" + "x" * 1_000_000 + "the remedy")
    said = capsys.readouterr().err
    assert said.startswith(r"first\nsecond\x1b[31mxx") and said.endswith("the remedy\n") and len(said) < LONGEST + 100
