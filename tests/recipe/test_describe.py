"""Types and docstrings in words."""

from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Interval, Le, Len, Lt, MaxLen, MinLen, MultipleOf
from pydantic import Field

from vocseg.recipe.describe import choices, describe_type, split_doc

Probability = Annotated[float, Interval(ge=0, le=1)]


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "whole number"),
        (bool, "true or false"),
        (str, "text"),
        (Probability, "number from 0 to 1"),
        (Annotated[float, Gt(0), Lt(1)], "number > 0 and < 1"),
        (Annotated[int, Ge(2)], "whole number ≥ 2"),
        (Annotated[int, Ge(2), Le(8)], "whole number from 2 to 8"),
        (Annotated[int, Ge(32), MultipleOf(32)], "whole number ≥ 32 and a multiple of 32"),
        (Annotated[int, Field(ge=1, le=9)], "whole number from 1 to 9"),
        (Annotated[str, Field(min_length=1)], "text of 1 or more characters"),
        (float | None, "number"),
        (None | Probability, "number from 0 to 1"),
        (Literal["a"], '"a"'),
        (Literal["a", "b"], '"a" or "b"'),
        (Literal["a", "b", 3], '"a", "b" or 3'),
        (Literal["a", "b"] | tuple[float, ...], '"a" or "b", or array of numbers'),
        (int | str | None, "whole number or text"),
        (tuple[float, float], "array of 2 numbers"),
        (tuple[Probability, Probability], "array of 2 numbers from 0 to 1"),
        (tuple[int, str], "array [whole number, text]"),
        (tuple[int, ...], "array of whole numbers"),
        (list[str], "array of texts"),
        (Annotated[tuple[str, ...], MinLen(2)], "array of 2 or more texts"),
        (Annotated[tuple[str, ...], Len(2, 255)], "array of 2 to 255 texts"),
        (Annotated[list[int], Len(3, 3)], "array of 3 whole numbers"),
        (Annotated[tuple[Probability, ...], MaxLen(4)], "array of 0 to 4 numbers from 0 to 1"),
        (tuple[tuple[int, int], ...], "array of arrays of 2 whole numbers"),
        (dict[str, Any], "table"),
    ],
)
def test_a_type_is_told_in_words(annotation: Any, words: str) -> None:
    assert describe_type(annotation) == words


def test_the_choices_of_a_type_are_found_at_any_depth() -> None:
    assert choices(Literal["a", "b"] | tuple[Literal["c", 3], ...]) == ["a", "b", "c"]
    assert choices(Annotated[int, Ge(1)]) == []


def test_a_docstring_is_split_into_its_text_and_what_it_says_of_each_parameter() -> None:
    doc = (
        "Crops.\n\nAt random: void.\n\nArgs:\n    size: side of a square,\n        or a pair.\n"
        "    p: how often: from 0\n        to 1.\n\nRaises:\n    UsageError: no."
    )
    assert split_doc(doc) == (
        "Crops.\n\nAt random: void.",
        {"size": "side of a square, or a pair.", "p": "how often: from 0 to 1."},
    )
    assert split_doc("") == ("", {})
    assert split_doc("One line.") == ("One line.", {})
