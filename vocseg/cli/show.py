"""`vocseg show`: a recipe as it will be run."""

from pathlib import Path

import click

from vocseg.cli import options
from vocseg.cli.output import print_json


@click.command("show")
@click.argument("recipe")
@options.recipe_options
@options.as_json
def command(
    recipe: str, overrides: tuple[str, ...], data: Path | None, seed: int | None, plugins: Path | None, as_json: bool
) -> None:
    """Print RECIPE, a path or a bundled name, with every default filled in.

    What is printed is a complete recipe; values the recipe left to their default are marked.
    """
    from vocseg.recipe.prepare import load_recipe
    from vocseg.recipe.writer import resolved_lines

    read, _ = load_recipe(recipe, overrides=overrides, data=data, seed=seed, plugins=plugins)
    if as_json:
        print_json(read.resolved)
        return
    lines = list(resolved_lines(read))
    width = min(max((len(line) for line, default in lines if default), default=0), 48)
    for line, default in lines:
        click.echo(click.style(f"{line:<{width}}  # default", dim=True) if default else line)
