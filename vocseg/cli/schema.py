"""`vocseg schema`: the JSON schema of recipes."""

from pathlib import Path

import click

from vocseg.cli import options
from vocseg.cli.output import print_json


@click.command("schema")
@options.plugins
def command(plugins: Path | None) -> None:
    """Print the JSON schema of recipes over all components that are there.

    An editor that knows the schema completes and checks recipes while they are written.
    """
    from vocseg.plugins import discover
    from vocseg.recipe.writer import json_schema

    print_json(json_schema(discover(project=Path.cwd(), plugins=plugins)))
