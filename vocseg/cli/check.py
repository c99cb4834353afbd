"""`vocseg check`: would this recipe run?"""

import json
from pathlib import Path

import click

from vocseg.cli import options


@click.command("check")
@click.argument("recipe")
@options.recipe_options
@options.as_json
def command(
    recipe: str, overrides: tuple[str, ...], data: Path | None, seed: int | None, plugins: Path | None, as_json: bool
) -> None:
    """Build all of RECIPE and try one batch forward and backward on the CPU, training nothing.

    Says what the run would do, and the network's parameters and memory. Nothing is written.
    """
    from vocseg.recipe.prepare import load_recipe

    read, _ = load_recipe(recipe, overrides=overrides, data=data, seed=seed, plugins=plugins)
    from vocseg.process import prepare_process

    prepare_process()
    from vocseg.trial import try_recipe

    report = try_recipe(read)
    if as_json:
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    width = max(map(len, report))
    for name, value in report.items():
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        if name.endswith("_bytes"):
            name, shown = name.removesuffix("_bytes"), f"{value / 2**20:,.0f} MiB"
        click.echo(f"{name.replace('_', ' '):<{width}}  {shown}")
    click.echo(f"{read.path}: ready to run")
