"""`vocseg check`: would this recipe run, and does this architecture keep its contract?"""

import contextlib
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vocseg.cli import options
from vocseg.cli.output import print_json, print_line
from vocseg.errors import Problem, UsageError, did_you_mean, visible

if TYPE_CHECKING:
    from vocseg.testing import Row
    from vocseg.testing.subject import Subject

STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "info": "cyan"}


@click.command("check")
@click.argument("target", required=False, metavar="[RECIPE|FILE.py]")
@click.option("--architecture", metavar="NAME", help="Check an architecture that `vocseg list` shows.")
@click.option(
    "--without", multiple=True, metavar="CHECK", help="Leave out a check of architectures, as in --without compile."
)
@options.recipe_options
@options.as_json
def command(
    target: str | None,
    architecture: str | None,
    without: tuple[str, ...],
    overrides: tuple[str, ...],
    data: Path | None,
    seed: int | None,
    plugins: Path | None,
    as_json: bool,
) -> None:
    """Try a recipe, or check that architectures keep their contract. Nothing is trained or written.

    \b
    vocseg check recipes/transfer_resnet34.toml
    vocseg check plugins/my_net.py
    vocseg check --architecture smp --set encoder=mobilenet_v2

    Of a RECIPE, everything is built and one batch goes forward and backward on the CPU; then follow what the run would
    do, and the network's parameters and memory. RECIPE is a path or a bundled name.

    Of FILE.py, every architecture in it is checked, with its defaults and what --set gives: shapes, gradients,
    freezing, precision and more, on the CPU and without data. Each check passes, warns or fails; below a warning or
    failure stands what to do.

    Exit code 0 if nothing fails, else 2; a warning is no failure.
    """
    if target is None and architecture is None:
        raise UsageError("vocseg check takes a RECIPE, a FILE.py, or --architecture NAME")
    if architecture is not None or (target is not None and target.endswith(".py")):
        if target is not None and not target.endswith(".py"):
            raise UsageError("--architecture goes without a RECIPE; a recipe names its own")
        if data is not None or seed is not None:
            raise UsageError("--data and --seed are for recipes; checking an architecture needs neither")
        if target is not None and plugins is not None:
            raise UsageError("--plugins is for recipes and --architecture; a FILE.py is checked as it is")
        _check_architectures(target, architecture, without, overrides, plugins, as_json)
        return
    if without:
        raise UsageError("--without is for architectures; a recipe is tried as a whole")
    assert target is not None
    _try_recipe(target, overrides, data, seed, plugins, as_json)


def _try_recipe(
    name: str, overrides: tuple[str, ...], data: Path | None, seed: int | None, plugins: Path | None, as_json: bool
) -> None:
    from vocseg.process import prepare_process
    from vocseg.recipe.prepare import load_recipe

    prepare_process()
    read, _ = load_recipe(name, overrides=overrides, data=data, seed=seed, plugins=plugins, to_run=True)
    from vocseg.trial import try_recipe

    report = try_recipe(read)
    if as_json:
        print_json(report)
        return
    width = max(map(len, report))
    for name, value in report.items():
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        if name.endswith("_bytes"):
            name, shown = name.removesuffix("_bytes"), f"{value / 2**20:,.0f} MiB"
        print_line(f"{name.replace('_', ' '):<{width}}  {shown}")
    print_line(f"{read.path}: ready to run")


def _check_architectures(
    file: str | None,
    name: str | None,
    without: tuple[str, ...],
    overrides: tuple[str, ...],
    plugins: Path | None,
    as_json: bool,
) -> None:
    params = _params(overrides)
    from vocseg.process import prepare_process

    prepare_process()
    with contextlib.redirect_stdout(sys.stderr):  # what a plugin prints is no row
        subjects = _subjects(file, name, plugins)
    rows: list[Row] = []
    for subject in subjects:
        if rows and not as_json:
            print_line()
        rows += _check(subject, params, without, as_json)
    if as_json:
        print_json([row.as_dict() for row in rows])
    if "--debug" in sys.argv:  # which `main` has taken from the arguments
        for row in rows:
            if row.error is not None:
                print_line(err=True)
                print_line(f"{row.architecture}: {row.name}", err=True)
                traceback.print_exception(row.error)
    if any(row.verdict == "fail" for row in rows):
        sys.exit(UsageError.exit_code)


def _params(overrides: tuple[str, ...]) -> dict[str, Any]:
    """What `--set` gives: parameters of the architecture, written as in a recipe's `[model]`."""
    from vocseg.recipe.toml import apply_override, flag, without_foreign

    params: dict[str, Any] = {}
    problems: list[Problem] = []
    for override in overrides:
        try:
            key = str(apply_override(params, override)[0])
        except UsageError as error:
            problems += error.problems
        else:
            problems += [Problem(flag(override), message) for _, message in without_foreign(params[key])[1]]
    if problems:
        raise UsageError(*problems)
    return params


def _subjects(file: str | None, name: str | None, plugins: Path | None) -> "list[Subject]":
    from vocseg.plugins import discover
    from vocseg.testing.subject import subjects

    if file is None:
        assert name is not None
        return subjects(discover(project=Path.cwd(), plugins=plugins).get("architecture", name))
    found = subjects(Path(file))
    chosen = [subject for subject in found if name in (None, subject.name)]
    if not chosen:
        near = did_you_mean(str(name), [subject.name for subject in found])
        raise UsageError(Problem(file, f"no architecture is named '{name}' there{near}"))
    return chosen


def _check(subject: "Subject", params: dict[str, Any], without: tuple[str, ...], as_json: bool) -> "list[Row]":
    """Makes all checks of one architecture, and prints each row as soon as it is known."""
    from vocseg.testing import CHECK_NAMES
    from vocseg.testing.checks import rows as checked
    from vocseg.testing.report import ending

    rows: list[Row] = []
    coming = checked(subject, params, without)
    width = max(map(len, CHECK_NAMES))
    while True:
        with contextlib.redirect_stdout(sys.stderr):
            row = next(coming, None)
        if not rows and not as_json:
            click.echo(f"{click.style(visible(subject.name), bold=True)}  {visible(subject.source)}")
        if row is None:
            break
        rows.append(row)
        if not as_json:
            _print_row(row, width)
    if not as_json:
        for line in ending(rows):
            print_line(line)
    return rows


def _print_row(row: "Row", width: int) -> None:
    """A row: in colours and within the window's width on a terminal, else each part on one line."""
    if not sys.stdout.isatty():
        from vocseg.testing.report import plain_lines

        for line in plain_lines(row, width):
            print_line(line)
    elif row.verdict != "skip":
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        style = STYLES[row.verdict]
        table = Table.grid(padding=(0, 2))
        table.add_column(width=4, no_wrap=True)
        table.add_column(width=width, no_wrap=True)
        table.add_column(overflow="fold")
        remedy = (f"\n-> {visible(row.remedy)}", style) if row.remedy else ""
        table.add_row(Text(row.verdict, style), Text(row.name), Text.assemble(visible(row.found), remedy))
        Console(highlight=False).print(table)
