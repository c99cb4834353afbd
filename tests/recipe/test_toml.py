"""TOML: the fence before the parser, lines of keys, --set, values no recipe takes, and writing."""

import copy
import math
import time
import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vocseg.errors import UsageError
from vocseg.recipe.toml import (
    MAX_BYTES,
    apply_override,
    key_lines,
    parse,
    without_foreign,
    write_key,
    write_value,
)

quick = settings(max_examples=60, deadline=None)


def refusal(text: bytes) -> str:
    with pytest.raises(UsageError) as caught:
        parse(text, "x.toml")
    (problem,) = caught.value.problems
    return str(problem)


# Parsing


def test_a_byte_order_mark_windows_line_ends_and_an_empty_file_are_fine() -> None:
    assert parse(b"\xef\xbb\xbfseed = 1\r\n[train]\r\nepochs = 2\r\n", "x.toml") == {"seed": 1, "train": {"epochs": 2}}
    assert parse(b"", "x.toml") == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"seed = 1\nseed = ", "x.toml:2: not TOML: invalid value"),
        (b"seed = 1\nseed = 2\n", "x.toml:2: not TOML: cannot overwrite a value"),
        (b"seed = 1\n\n[train\n", "x.toml:3: not TOML: expected ']' at the end of a table declaration"),
        (b'a = """\nb\n\n', "x.toml:2: not TOML: unterminated string"),
        (b"a = 1\nb = '\xff'", "x.toml:2: not UTF-8 text; save the recipe as UTF-8"),
        (b"\xff\xfes\0e\0", "x.toml:1: not UTF-8 text; save the recipe as UTF-8"),
        (b"seed = " + b"9" * 5000, "x.toml: not TOML: a number with thousands of digits"),
    ],
)
def test_what_is_not_toml_is_refused_with_its_line(text: bytes, expected: str) -> None:
    assert refusal(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"#" * (MAX_BYTES + 1), "x.toml: expected a recipe of at most 65,536 bytes, found more"),
        (b"\n" + b"a." * 20_000 + b"a = 1", "x.toml:2: a key of more than 64 parts"),
        (b"[" + b"a . " * 15_000 + b"a]", "x.toml:1: a key of more than 64 parts"),
        (b'",".' * 15_000 + b"a = 1", "x.toml:1: a key of more than 64 parts"),
        (b"a = " + b"[" * 10_000, "x.toml: nested deeper than 64 levels"),
        (b"a = " + b"[\n" * 10_000, "x.toml: nested deeper than 64 levels"),
        (b"a = " + b"{a=" * 10_000, "x.toml: nested deeper than 64 levels"),
        (b"a = " + b"[" * 100 + b"]" * 100, "x.toml: nested deeper than 64 levels"),
    ],
)
def test_what_would_keep_the_parser_busy_is_refused_at_once(text: bytes, expected: str) -> None:
    begun = time.process_time()
    assert refusal(text) == expected
    assert time.process_time() - begun < 1  # without the fence 4 seconds and 1.5 GB


def test_many_numbers_colours_or_dots_are_no_deep_nesting() -> None:
    weights, colours = ", ".join(["0.5"] * 150), ", ".join(["[1, 2, 3]"] * 150)
    text = f"# {'.' * 100}\na = [{weights}]\nb = [\n  {weights}\n]\nc = [{colours}] # 1.2\nd = '{'.' * 100}'"
    assert len(parse(text.encode(), "x.toml")["a"]) == 150


# Lines


TRICKY = '''\
# [not.a.table]
description = """
[train]
epochs = 3
""" # [no]
seed = 1 # seed
"quoted" = '[x]'
[model]
name = "a # b [c"
sizes = [
  [1, 2], # ]]
  [3, 4],
]
options = { depth = 3,  b = "}" }
note = """one line"""
  [data]   # the data
root.deep . er = 1
[[loss]]
name = "a"
  [[ loss ]]
name = "b"
[loss.more]
x = 1
[a."b.c"]
y = \'\'\'
[z]\'\'\'
after = 1
'''


def test_every_key_is_found_on_its_line() -> None:
    tomllib.loads(TRICKY)
    assert key_lines(TRICKY) == {
        ("description",): 2,
        ("seed",): 6,
        ("quoted",): 7,
        ("model",): 8,
        ("model", "name"): 9,
        ("model", "sizes"): 10,
        ("model", "options"): 14,
        ("model", "note"): 15,
        ("data",): 16,
        ("data", "root"): 17,
        ("data", "root", "deep"): 17,
        ("data", "root", "deep", "er"): 17,
        ("loss",): 18,
        ("loss", 0): 18,
        ("loss", 0, "name"): 19,
        ("loss", 1): 20,
        ("loss", 1, "name"): 21,
        ("loss", 1, "more"): 22,
        ("loss", 1, "more", "x"): 23,
        ("a",): 24,
        ("a", "b.c"): 24,
        ("a", "b.c", "y"): 25,
        ("a", "b.c", "after"): 27,
    }


def test_lines_end_where_an_editor_ends_them() -> None:
    # U+2028 and U+0085 are no line breaks in TOML, though Python's splitlines breaks there.
    assert key_lines('a = "\u2028\x85"\r\nb = 1') == {("a",): 1, ("b",): 2}


# Overrides


def overridden(override: str) -> dict[str, Any]:
    data: dict[str, Any] = {"train": {"epochs": 3}, "loss": [{"name": "a"}, {"name": "b"}]}
    apply_override(data, override)
    return data


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("1e-3", 0.001),
        ("true", True),
        ('"none"', "none"),
        ("none", "none"),  # a shell ate the quotes
        ("a b.pth", "a b.pth"),
        ("weights/a=b.pth", "weights/a=b.pth"),
        ("[0.5, 2]", [0.5, 2]),
        ("{name = 'x'}", {"name": "x"}),
        ("True", "True"),  # a string, which the key's type will refuse
        ("5 # five", 5),
        ("1.2.3", "1.2.3"),
    ],
)
def test_the_right_side_is_toml_or_else_text(text: str, value: object) -> None:
    assert overridden(f"train.x = {text}")["train"] == {"epochs": 3, "x": value}


def test_a_key_leads_through_tables_arrays_and_what_is_not_there_yet() -> None:
    assert overridden("train.epochs=5")["train"] == {"epochs": 5}
    assert overridden("loss.1.name=c")["loss"] == [{"name": "a"}, {"name": "c"}]
    assert overridden("loss.0={name='d'}")["loss"] == [{"name": "d"}, {"name": "b"}]
    assert overridden("loss=[]")["loss"] == []
    assert overridden("early_stopping.deep.er=1")["early_stopping"] == {"deep": {"er": 1}}
    assert apply_override({"loss": [{}]}, "loss.0.weight=2") == ("loss", 0, "weight")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.epochs", "expected key=value, as in --set train.epochs=5"),
        ("=5", "expected key=value"),
        ("train..epochs=5", "expected key=value"),
        ("0=5", "expected key=value"),
        ("train.\u00b2=5", "expected key=value"),
        ("train.epochs=", "expected key=value, as in --set train.epochs=5; no value"),
        ("train.epochs=[1", "'[1' is not a TOML value"),
        ("train.epochs={a", "'{a' is not a TOML value"),
        ("train.epochs='a", "is not a TOML value"),
        ("train.epochs=5\nseed=3", "is not a TOML value"),
        ("loss.2.name=c", "'loss' is an array of 2, counted from 0"),
        ("loss.name=c", "'loss' is an array of 2, counted from 0"),
        ("train.0=1", "'train' is a table, and 0 an index"),
        ("train.epochs.x=1", "'train.epochs' is neither a table nor an array"),
        ("augmentation.0.size=1", "the recipe gives no array 'augmentation'"),
    ],
)
def test_an_override_that_cannot_be_applied_changes_nothing(override: str, reason: str) -> None:
    data: dict[str, Any] = {"train": {"epochs": 3}, "loss": [{}, {}]}
    before = copy.deepcopy(data)
    with pytest.raises(UsageError) as caught:
        apply_override(data, override)
    (problem,) = caught.value.problems
    assert problem.where == f"--set {' '.join(override.split())}"
    assert reason in problem.message
    assert data == before


def test_a_long_override_is_named_in_short() -> None:
    with pytest.raises(UsageError) as caught:
        apply_override({}, f"a.b=[{'x' * 1000}")
    assert len(caught.value.problems[0].where) < 80


# Values that TOML has and recipes have not


def test_dates_infinities_and_numbers_beyond_64_bits_are_found_wherever_they_are() -> None:
    data = tomllib.loads(
        "a = 2020-01-01\nb = {c = [1, nan]}\nd = -inf\ne = 1e999\nf = 0x8000000000000000\ng = -9223372036854775808\n"
        "h = [{t = 12:00:00}, {t = 1979-05-27T07:32:00Z}]"
    )
    clean, problems = without_foreign(data)
    assert clean == {
        "a": None, "b": {"c": [1, None]}, "d": None, "e": None, "f": None,
        "g": -(2**63), "h": [{"t": None}, {"t": None}]
    }  # fmt: skip
    date = "is a date or time, which no recipe key takes; quote it if it is text"
    assert problems == [
        (("a",), f"2020-01-01 {date}"),
        (("b", "c", 1), "expected a finite number, found nan"),
        (("d",), "expected a finite number, found -inf"),
        (("e",), "expected a finite number, found inf"),
        (("f",), "expected a whole number of at most 64 bits, found a larger one"),
        (("h", 0, "t"), f"12:00:00 {date}"),
        (("h", 1, "t"), f"1979-05-27 07:32:00+00:00 {date}"),
    ]  # fmt: skip


def test_a_nul_in_a_text_is_found() -> None:
    nul = "expected text, found a NUL character in it, which ends text for much of a computer"
    assert without_foreign({"a": ["b", "c\0"]}) == ({"a": ["b", None]}, [(("a", 1), nul)])


# Writing


scalars = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_characters="\0"))
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
    max_leaves=12,
)


@quick
@given(values)
def test_what_is_written_reads_the_same(value: object) -> None:
    assert tomllib.loads(f"x = {write_value(value)}") == {"x": value}
    assert without_foreign(value) == (value, [])


@quick
@given(st.text(st.characters(codec="utf-8")))
def test_a_written_key_reads_the_same_and_has_one_line(key: str) -> None:
    assert tomllib.loads(f"{write_key(key)} = 1") == {key: 1}
    assert "\n" not in write_key(key)


def test_numbers_keep_their_type_and_every_digit() -> None:
    assert (
        write_value([1, 1.0, 1e-8, 0.1 + 0.2, 2**62, True])
        == "[1, 1.0, 1e-08, 0.30000000000000004, 4611686018427387904, true]"
    )
    assert math.copysign(1, tomllib.loads(f"x = {write_value(-0.0)}")["x"]) == -1
    assert write_value(("a", (1, 2))) == '["a", [1, 2]]'
