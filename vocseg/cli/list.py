"""`vocseg list`: all components, those of one kind, or one with its parameters."""

import json
from collections.abc import Sequence
from pathlib import Path

import click

from vocseg.cli import options
from vocseg.errors import UsageError, did_you_mean
from vocseg.plugins import discover
from vocseg.registry import KINDS, Component, Registry


@click.command("list")
@click.argument("what", required=False, metavar="[KIND|NAME]")
@options.as_json
@options.plugins
@click.option("--load", is_flag=True, help="Import every plugin too, to see which fail.")
def command(what: str | None, as_json: bool, plugins: Path | None, load: bool) -> None:
    """List components: all, those of one KIND, or one NAME with its parameters, docstring and file.

    Kinds: architecture, loss, augmentation, optimizer, schedule, initializer, dataset.
    Plugins are read, not run: a file that cannot be read is a row with its reason.
    """
    registry = discover(project=Path.cwd(), plugins=plugins)
    named = [c for c in registry if c.name == what]
    if what is None or what in KINDS:
        shown = [c for c in registry if what is None or c.kind == what]
        rows = [_row(c, load) for c in shown]
        broken = [
            {"kind": "broken", "name": Path(b.file).name, "summary": b.reason, "source": b.file}
            for b in registry.broken
        ]
        if as_json:
            click.echo(json.dumps([*rows, *broken], indent=2, ensure_ascii=False))
        else:
            _print_table([*rows, *broken], registry)
    elif named:
        if as_json:
            click.echo(json.dumps([_details(c) for c in named], indent=2, ensure_ascii=False))
        else:
            for component in named:
                _print_component(component)
    else:
        raise UsageError(
            f"no kind or component is named '{what}'{did_you_mean(what, [*KINDS, *(c.name for c in registry)])}"
        )


def _row(component: Component, load: bool) -> dict[str, str]:
    summary, kind = component.summary, component.kind
    if load:
        try:
            component.load()
        except UsageError as error:
            kind, summary = "broken", str(error)
    return {"kind": kind, "name": component.name, "summary": summary, "source": component.source}


def _details(component: Component) -> dict[str, object]:
    parameters = [
        {"name": p.name, "type": p.text, "required": p.required, "default": None if p.required else p.default}
        for p in component.parameters
    ]
    return {**_row(component, load=False), "doc": component.doc, "parameters": parameters}


def _print_table(rows: Sequence[dict[str, str]], registry: Registry) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("kind", "name", "summary"):
        table.add_column(name, no_wrap=name != "summary")
    origins = {c.source: c.origin for c in registry}
    last = ""
    for row in rows:
        broken = row["kind"] == "broken"
        origin = origins.get(row["source"], "")
        note = "" if origin in ("vocseg", "bundled", "") else f"  ({origin})"
        kind = row["kind"] if row["kind"] != last else ""
        last = row["kind"]
        style = "red" if broken else ""
        summary = (
            f"{row['source']}: {row['summary']}" if broken and row["source"] not in row["summary"] else row["summary"]
        )
        table.add_row(
            Text(kind, "red" if broken else "dim"), Text(row["name"], style or "bold"), Text(summary + note, style)
        )
    if console.is_terminal:
        console.print(table)
    else:  # one line a component, whatever the width, for grep and awk
        for row in rows:
            click.echo(f"{row['kind']}\t{row['name']}\t{row['summary']}\t{row['source']}")


def _print_component(component: Component) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from vocseg.recipe.describe import describe_type
    from vocseg.recipe.toml import write_value

    console = Console()
    console.print(Text.assemble((component.name, "bold"), f"  {component.kind}", "\n"))
    click.echo(component.doc)
    if component.parameters:
        table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
        for name in ("parameter", "default", "values"):
            table.add_column(name)
        for p in component.parameters:
            default = "required" if p.required else ("not set" if p.default is None else write_value(p.default))
            table.add_row(Text(p.name, "bold"), Text(default), Text(describe_type(p.annotation)))
        console.print()
        console.print(table)
    console.print(Text(f"\n{component.source}", "dim"))
