"""What a conformance check found: a row for each check, and the report of them all. Text only, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["pass", "warn", "fail", "info", "skip"]


@dataclass(frozen=True)
class Row:
    """The outcome of one check.

    Attributes:
        name: the check's, as `without` takes it.
        verdict: `fail` breaks the contract; `warn` limits how the network can be used; `info` is a fact; `skip` was not
            tried, because a check before it failed.
        remedy: what to do about a `warn` or `fail`; empty for the others.
        value: the fact of an `info` as a number: a count, FLOPs, bytes or seconds.
        error: the exception behind a `fail` or `warn`, where there was one.
    """

    architecture: str
    name: str
    verdict: Verdict
    found: str
    remedy: str = ""
    value: float | None = None
    error: BaseException | None = field(default=None, repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """The row as plain data, without its exception."""
        kept = ("architecture", "name", "verdict", "found", "remedy", "value")
        return {name: getattr(self, name) for name in kept}


@dataclass(frozen=True)
class Report:
    """All rows of one or more architectures. `str(report)` is a table in plain text."""

    rows: tuple[Row, ...]

    @property
    def failures(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.verdict == "fail")

    @property
    def passed(self) -> bool:
        """Whether nothing failed; warnings are no failures."""
        return not self.failures

    def raise_if_failed(self) -> None:
        """For tests.

        Raises:
            AssertionError: something failed; the message has each failure with its remedy.
        """
        __tracebackhide__ = True  # pytest then shows the line of the test, not this one
        if self.failures:
            names = ", ".join(dict.fromkeys(row.architecture for row in self.failures))
            told = [f"  {row.name}: {row.found}; {row.remedy}" for row in self.failures]
            checks = "1 check" if len(told) == 1 else f"{len(told)} checks"
            raise AssertionError("\n".join([f"{names} fails {checks} of {len(self.rows)}:", *told]))

    def __str__(self) -> str:
        lines: list[str] = []
        for name in dict.fromkeys(row.architecture for row in self.rows):
            lines += plain_table(name, [row for row in self.rows if row.architecture == name])
        return "\n".join(lines)


def plain_table(architecture: str, rows: Sequence[Row]) -> list[str]:
    """The lines of one architecture: its rows, what was not tried, and how often there was each verdict."""
    width = max((len(row.name) for row in rows if row.verdict != "skip"), default=0)
    table = [line for row in rows for line in plain_lines(row, width)]
    return [architecture, *(f"  {line}" for line in [*table, *ending(rows)])]


def plain_lines(row: Row, width: int) -> list[str]:
    """The lines of a row: verdict, check and finding, and below these the remedy. What was not tried has none."""
    if row.verdict == "skip":
        return []
    remedy = [f"{'':<{width + 8}}-> {row.remedy}"] if row.remedy else []
    return [f"{row.verdict}  {row.name:<{width}}  {row.found}", *remedy]


def ending(rows: Sequence[Row]) -> list[str]:
    """The lines below the rows of an architecture."""
    untried = [row.name for row in rows if row.verdict == "skip"]
    return [*([f"not tried: {', '.join(untried)}"] if untried else []), summary(rows)]


def summary(rows: Sequence[Row]) -> str:
    """The count of each verdict: `25 passed, 1 warning, 0 failed`."""
    count = {verdict: sum(row.verdict == verdict for row in rows) for verdict in ("pass", "warn", "fail", "skip")}
    warned = "1 warning" if count["warn"] == 1 else f"{count['warn']} warnings"
    untried = [f"{count['skip']} not tried"] * bool(count["skip"])
    return ", ".join([f"{count['pass']} passed", warned, f"{count['fail']} failed", *untried])
