"""Text from outside is shown without control characters, and cut."""

import pytest

from raykd.display import display, summary

EVIL = "\x1b]0;title\x07\x1b[2J\x1b[1;1H\u202egnorw\u202c\x00\x9b31m\ud800"


def test_non_printable_characters_are_escaped():
    assert display(EVIL).isprintable()
    assert display(EVIL).startswith("\\x1b]0;title\\x07\\x1b[2J")
    assert "\\u202egnorw\\u202c" in display(EVIL)
    assert display("5 ≤ 7 – naïve 数") == "5 ≤ 7 – naïve 数"


@pytest.mark.parametrize(("multiline", "shown"), [(True, "a\n\tb\\r"), (False, "a\\n\\tb\\r")])
def test_line_breaks(multiline: bool, shown: str):
    assert display("a\n\tb\r", multiline=multiline) == shown


def test_long_texts_are_cut_and_say_so():
    text = "start " + "x" * 200_000 + " end"
    shown = display(text, limit=100)
    assert shown.startswith("start xx") and shown.endswith("xx end")
    assert "(200,010 characters)" in shown
    assert len(shown) < 130
    assert display("x" * 100, limit=100) == "x" * 100


def test_summary_of_an_exception():
    assert summary(ValueError("first\n   second\x1b[2J")) == "first second\\x1b[2J"
    assert summary(ValueError()) == "ValueError"
    assert len(summary("word " * 1000)) < 340
