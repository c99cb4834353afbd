"""`vocseg list`: all components, those of one kind, one with its parameters, or the recipes."""

import contextlib
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from vocseg.cli import options
from vocseg.cli.output import print_json, printable
from vocseg.errors import UsageError, did_you_mean, shorten, shown_path, visible
from vocseg.plugins import bundled, discover
from vocseg.registry import KINDS, BrokenPlugin, Component, Registry

BROKEN = "broken"
"""Stands for the kind of what could not be read or, with --load, imported."""

RECIPE = "recipe"


@click.command("list")
@click.argument("what", required=False, metavar="[KIND|NAME]")
@options.as_json
@options.plugins
@click.option("--load", is_flag=True, help="Import every plugin too, to see which fail.")
def command(what: str | None, as_json: bool, plugins: Path | None, load: bool) -> None:
    """List components: all, those of one KIND, or one NAME with its parameters, docstring and file.

    \b
    Kinds: architecture, loss, augmentation, optimizer, schedule,
           initializer, dataset; and recipe: what `vocseg run` takes.

    Plugins are read, not run: a file that cannot be read is a row with its reason.
    """
    if what == RECIPE:
        _print_rows(list(_recipe_rows(Path.cwd())), as_json)
        return
    registry = discover(project=Path.cwd(), plugins=plugins)
    named = [c for c in registry if c.name == what]
    if what is None or what in KINDS:
        rows = [_row(c, load) for c in registry if what in (None, c.kind)]
        rows += [_broken_row(b) for b in registry.broken]
        rows += [_clash_row(c, registry) for c in registry.clashes if what in (None, c.kind)]
        _print_rows(rows, as_json, {c.source for c in registry if c.origin not in ("vocseg", "bundled")})
    elif named and as_json:
        print_json([_details(c) for c in named])
    elif named:
        for component in named:
            _print_component(component)
    elif clashes := [c for c in registry.clashes if c.name == what]:
        raise UsageError(*dict.fromkeys(registry.missing(c.kind, what) for c in clashes))
    else:
        known = did_you_mean(what, [*KINDS, RECIPE, *(c.name for c in registry)])
        notes = [f"note: {shown_path(b.file)} could not be read: {b.reason}" for b in registry.broken]
        raise UsageError(f"no kind or component is named '{shorten(what)}'{known}", *notes)


def _row(component: Component, load: bool) -> dict[str, str]:
    kind, summary = component.kind, component.summary
    if load:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # what a plugin prints is no row
                component.load()
        except UsageError as error:
            kind, summary = BROKEN, error.problems[0].message
    return {"kind": kind, "name": component.name, "summary": summary, "source": component.source}


def _broken_row(plugin: BrokenPlugin) -> dict[str, str]:
    return {"kind": BROKEN, "name": Path(plugin.file).name, "summary": plugin.reason, "source": plugin.file}


def _clash_row(component: Component, registry: Registry) -> dict[str, str]:
    reason = registry.missing(component.kind, component.name)
    return {"kind": BROKEN, "name": component.name, "summary": reason, "source": component.source}


def _recipe_rows(folder: Path) -> Iterator[dict[str, str]]:
    """The shipped recipes and those of `folder` and its `recipes/`, with what they say of themselves."""
    from vocseg.recipe.toml import MAX_BYTES, parse

    shipped = sorted(bundled("recipes").glob("*.toml"))
    own = [*sorted(folder.glob("*.toml")), *sorted((folder / "recipes").glob("*.toml"))]
    # Files only: an editor may have left a link to nowhere beside the recipe that it has open.
    for path in dict.fromkeys(path.resolve() for path in [*shipped, *own] if path.is_file()):
        try:
            with open(path, "rb") as file:
                content = parse(file.read(MAX_BYTES + 1), str(path))
        except UsageError as error:
            wrong = error.problems[0]
            yield {"kind": BROKEN, "name": path.name, "summary": wrong.message, "source": wrong.where}
            continue
        except OSError as error:
            reason = f"cannot be read: {error.strerror}"
            yield {"kind": BROKEN, "name": path.name, "summary": reason, "source": str(path)}
            continue
        if "model" in content and "train" in content:  # a pyproject.toml is none
            name = path.stem if path.parent == shipped[0].resolve().parent else shown_path(str(path))
            summary = " ".join(str(content.get("description", "")).split())
            yield {"kind": RECIPE, "name": name, "summary": summary, "source": str(path)}


def _details(component: Component) -> dict[str, Any]:
    from vocseg.recipe.describe import describe_type, split_doc

    said = split_doc(component.doc)[1]
    parameters = [
        {
            "name": p.name,
            "required": p.required,
            "default": None if p.required else p.default,
            "values": describe_type(p.annotation),
            "description": said.get(p.name, ""),
        }
        for p in component.parameters
    ]
    return {**_row(component, load=False), "doc": component.doc, "parameters": parameters}


def _print_rows(rows: Sequence[dict[str, str]], as_json: bool, foreign: Collection[str] = ()) -> None:
    if as_json:
        print_json(rows)
    elif sys.stdout.isatty():
        _print_table(rows, foreign)
    else:  # one line a component, whatever the width, for grep and cut
        for row in rows:
            fields = row["kind"], row["name"], row["summary"], shown_path(row["source"])
            click.echo("\t".join(map(visible, fields)))


def _print_table(rows: Sequence[dict[str, str]], foreign: Collection[str]) -> None:
    """A block of names with summaries for each kind; what came neither with vocseg nor in its wheel has its file."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    width = max((len(row["name"]) for row in rows), default=0)
    for kind in (*KINDS, RECIPE, BROKEN):
        of_kind = [row for row in rows if row["kind"] == kind]
        if not of_kind:
            continue
        console.print(Text(kind, "bold red" if kind == BROKEN else "bold"))
        table = Table.grid(padding=(0, 2))
        table.add_column(width=width, no_wrap=True)
        table.add_column(overflow="fold")
        for row in of_kind:
            summary = Text(visible(row["summary"]))
            if kind == BROKEN or row["source"] in foreign:
                summary.append(f"  {visible(shown_path(row['source']))}", "dim")
            table.add_row(Text(visible(row["name"]), "red" if kind == BROKEN else "cyan"), summary)
        console.print(Padding(table, (0, 0, 0, 2)))
    if rows and rows[0]["kind"] == RECIPE:
        hint = "vocseg show NAME prints one whole."
    else:
        hint = "vocseg list NAME shows one with its parameters; vocseg list recipe shows what can be run."
    console.print(Text(f"\n{hint}", "dim"))


def _print_component(component: Component) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from vocseg.recipe.describe import describe_type, split_doc
    from vocseg.recipe.schema import PLACES
    from vocseg.recipe.toml import write_value

    console = Console(highlight=False)
    place = next(place for place in PLACES if place.kind == component.kind)
    shared = [key for key in place.core.model_fields if key != "name"]
    text, said = split_doc(component.doc)
    console.print(Text.assemble((component.name, "bold cyan"), f"  {component.kind}  ", (place.header, "dim")))
    for paragraph in filter(None, text.split("\n\n")):
        plain = not any(line.startswith((" ", "-", "*")) for line in paragraph.splitlines())
        console.print()
        console.print(Padding(Text(printable(" ".join(paragraph.split()) if plain else paragraph)), (0, 2)))
    if component.parameters:
        console.print()
        table = Table.grid(padding=(0, 2))
        table.add_column(width=max(len(p.name) for p in component.parameters), no_wrap=True)
        table.add_column(overflow="fold")
        table.add_column(overflow="fold")
        for p in component.parameters:
            default = "required" if p.required else ("not set" if p.default is None else write_value(p.default))
            values = Text(visible(describe_type(p.annotation)), "italic")
            meaning = Text.assemble(values, "\n", visible(said[p.name])) if p.name in said else values
            table.add_row(Text(p.name, "cyan"), Text(default, "yellow" if p.required else ""), meaning)
        console.print(Padding(table, (0, 2)))
    if shared:
        console.print(Padding(Text(f"Every {place.header} also takes {', '.join(shared)}.", "dim"), (1, 2, 0, 2)))
    console.print(Text(f"\n  {visible(shown_path(component.source))}", "dim"))
