"""Options that several commands share, and the recipe they lead to."""

from collections.abc import Callable
from pathlib import Path

import click

from vocseg.cli.output import print_line

FOLDER = click.Path(path_type=Path)

plugins = click.option(
    "--plugins", type=FOLDER, metavar="DIR", help="One more plugin folder, besides the one beside or above the recipe."
)
data = click.option(
    "--data", type=FOLDER, metavar="DIR", help="Folder of the data, before VOCSEG_DATA and the recipe's data.root."
)
overrides = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=TOML", help="Change one recipe key, as in --set train.epochs=5."
)
device = click.option(
    "--device", default="auto", show_default=True, metavar="D", help="auto, cpu, mps, cuda or cuda:N."
)
compiled = click.option(
    "--compile",
    "compiled",
    is_flag=True,
    help="Compile the network first, to be faster after a minute. Needs a C++ compiler.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
seed = click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), metavar="N", help="Seed of the run, in place of the recipe's."
)


def note(text: str) -> None:
    """Says what the user should know and need not act on."""
    print_line(f"note: {text}", err=True)


def recipe_options(function: Callable) -> Callable:
    """The options that decide what a recipe says."""
    for option in (plugins, seed, data, overrides):
        function = option(function)
    return function
