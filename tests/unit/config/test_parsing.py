"""YAML: values that JSON can hold, and what is refused with its place."""

import json

import pytest

from raykd.config.parsing import MAX_NODES, parse_yaml
from raykd.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5", 1.5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-3", -3),
        ("010", 10),
        ("0x1f", 31),
        ("0o17", 15),
        ("1:30", "1:30"),
        ("2025-01-31", "2025-01-31"),
        ("1_000", "1_000"),
        ("yes", True),
        ("~", None),
        ("", None),
        ("a#b", "a#b"),
        ("[1, x, 'y']", [1, "x", "y"]),
        ("{a: {b: c}}", {"a": {"b": "c"}}),
        ("base: &x {b: 1, c: 2}\nown: {<<: *x, b: 3}", {"base": {"b": 1, "c": 2}, "own": {"b": 3, "c": 2}}),
    ],
)
def test_values(text: str, value: object):
    parsed = parse_yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)
    assert json.loads(json.dumps(parsed, allow_nan=False)) == parsed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' occurs twice"),
        ("a: {b: 1, b: 2}", "line 1, column 11: the key 'b' occurs twice"),
        ("no: 1", "line 1, column 1: YAML does not read the key no as a text: write 'no'"),
        ("a: {1: 2}", "line 1, column 5: YAML does not read the key 1"),
        ("? [a]\n: b", "line 1, column 3: a key should be a text"),
        ("a: .inf", "line 1, column 4: .inf is not a finite number"),
        ("a: 1e999", "1e999 is not a finite number"),
        ("a: .nan", ".nan is not a finite number"),
        ("a: &x [1, *x]", "line 1, column 11: an alias stands for a value that contains it"),
        ("a: *unknown", "line 1, column 4: found undefined alias 'unknown'"),
        ("a: !!set {x}", "line 1, column 4: could not determine a constructor"),
        ("a: !!binary aGVsbG8=", "could not determine a constructor"),
        ("a: !!python/object:builtins.dict {}", "could not determine a constructor"),
        ('a: "x\\0y"', "line 1, column 4: the text has a NUL character"),
        ('a: "\\ud800"', "half of a surrogate pair"),
        ("a: 1\nb: \x07", "line 2: the character U+0007"),
        ("a: b\n---\na: c", "line 2, column 1: expected a single document"),
        ("[" * 3000, "nested too deeply"),
        ("1" * 5000, "not YAML: Exceeds the limit (4300 digits)"),
    ],
)
def test_refused_with_the_place(text: str, message: str):
    with pytest.raises(UserError) as caught:
        parse_yaml(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_aliases_are_counted_as_what_they_stand_for():
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    for level in range(1, 9):
        lines.append(f"l{level}: &l{level} [{', '.join([f'*l{level - 1}'] * 10)}]")
    assert parse_yaml("\n".join(lines[:3]))["l2"][9][9] == ["x"] * 10
    with pytest.raises(UserError, match=f"line 5, column 5: there are more than {MAX_NODES:,} values"):
        parse_yaml("\n".join(lines))


@pytest.mark.parametrize("value", ["/data/mine #1", "#1", "[1, 2] # two"])
def test_a_comment_may_be_refused(value: str):
    parse_yaml(value)
    with pytest.raises(UserError, match="begins a comment"):
        parse_yaml(value, allow_comments=False)
    assert parse_yaml(f"'{value}'", allow_comments=False) == value
