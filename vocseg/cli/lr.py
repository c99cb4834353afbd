"""`vocseg lr`: which learning rate to use."""

import math
from pathlib import Path
from typing import Any

import click

from vocseg.cli import options
from vocseg.cli.output import print_json, print_line


@click.command("lr")
@click.argument("recipe")
@options.recipe_options
@options.device
@click.option(
    "--from", "low", type=float, default=1e-7, show_default=True, metavar="LR", help="Rate of the first step."
)
@click.option("--to", "high", type=float, default=1.0, show_default=True, metavar="LR", help="Rate of the last step.")
@click.option("--steps", type=click.IntRange(20, 100_000), default=100, show_default=True, help="Steps to make.")
@click.option(
    "--out", type=options.FOLDER, metavar="DIR", help="Folder to write into; runs/<recipe>/lr-<time> if left out."
)
@options.as_json
def command(
    recipe: str,
    overrides: tuple[str, ...],
    data: Path | None,
    seed: int | None,
    plugins: Path | None,
    device: str,
    low: float,
    high: float,
    steps: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Try learning rates for RECIPE, a path or a bundled name, and draw the loss over them.

    \b
    vocseg lr recipes/transfer_resnet34.toml
    vocseg lr quickstart --from 1e-5 --to 10 --steps 200

    The recipe is trained for a few steps, with its own batches, losses and optimizer, at rates that grow exponentially
    (Smith 2015, arXiv:1506.01186), until it diverges. Where the loss falls fastest is a rate to begin with. No recipe
    is changed; lr.png and lr.json go to a folder, whose path is the last thing printed.
    """
    from vocseg.errors import UsageError

    if not 0 < low < high < math.inf:
        raise UsageError(f"--from {low:g} --to {high:g}: expected two numbers above 0, the first below the second")
    from vocseg.process import prepare_process
    from vocseg.recipe.prepare import load_recipe

    prepare_process()
    read, _ = load_recipe(recipe, overrides=overrides, data=data, seed=seed, plugins=plugins, to_run=True)
    from vocseg.cli.progress import follow, progress_bar
    from vocseg.lr import Tried, try_rates
    from vocseg.runs.files import without_nan

    trying = try_rates(read, low=low, high=high, steps=steps, out=out, device=device)
    with progress_bar("trying rates") as (advance, say):

        def show(tried: Tried) -> None:
            for line in tried.said:
                say(line)
            advance(tried.done, tried.total)

        result = follow(trying, show)
    if as_json:
        print_json(without_nan(result), indent=None)
        return
    by_key = any(parameter.name == "lr" for parameter in read.optimizer.component.parameters)
    _print_table(result, by_key)
    print_line(result["folder"])


def _print_table(result: dict[str, Any], by_key: bool) -> None:
    suggestion, diverged = result["suggestion"], result["diverged"]
    rows = [
        ("steepest descent", suggestion, f"try --set optimizer.lr={suggestion:g}" if by_key and suggestion else ""),
        ("stops falling", result["stops_falling"], ""),
        ("diverges", diverged, "" if diverged else f"not up to {result['rates'][-1]:g}"),
        ("the recipe's", result["recipe_lr"], ""),
    ]
    for name, rate, said in rows:
        print_line(f"{name:<16}  {'-' if rate is None else f'{rate:.2g}':<8}  {said}".rstrip())
    if result["remark"]:
        print_line(f"no suggestion: {result['remark']}")
