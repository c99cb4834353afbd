"""`vocseg run`: train a recipe."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from vocseg.cli import options


@click.command("run")
@click.argument("recipe", required=False)
@options.recipe_options
@click.option(
    "--out", type=options.FOLDER, metavar="DIR", help="Folder that holds <recipe>/<time>-<id>; runs if left out."
)
@options.device
@click.option("--resume", type=options.FOLDER, metavar="RUN", help="Go on with an interrupted run folder.")
@click.option("--fetch", is_flag=True, help="Fetch the data set first, if it is not there.")
@click.option("--quiet", is_flag=True, help="Print the run's path and nothing else.")
@options.as_json
def command(
    recipe: str | None,
    overrides: tuple[str, ...],
    data: Path | None,
    seed: int | None,
    plugins: Path | None,
    out: Path | None,
    device: str,
    resume: Path | None,
    fetch: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Train RECIPE, a path or a bundled name, and write a run folder; its path is the last thing printed.

    \b
    vocseg run quickstart
    vocseg run recipes/transfer_resnet34.toml --data DIR --set train.epochs=20
    vocseg run --resume runs/quickstart/20260102-030405-ab12

    With --resume, --data says where the run's images are now, and --set changes what no figure depends on: data.root,
    data.workers, data.cache, data.timeout_seconds, train.checkpoint_minutes and description; and train.on_nonfinite.
    """
    from vocseg.errors import UsageError

    if (recipe is None) == (resume is None):
        raise UsageError("vocseg run takes a RECIPE, or --resume RUN")
    if resume is not None and (seed is not None or plugins or fetch or out):
        raise UsageError(
            "--resume goes on with the run's own recipe, in its own folder; it takes --data, --set, --device, --quiet "
            "and --json only"
        )
    from vocseg.process import prepare_process
    from vocseg.witness import witnessed

    prepare_process()
    with witnessed():
        read = None
        if recipe is not None:
            from vocseg.recipe.prepare import load_recipe

            # The recipe is checked before torch is imported: its errors come at once.
            read, _ = load_recipe(recipe, overrides=overrides, data=data, seed=seed, plugins=plugins, to_run=not fetch)
            if fetch:
                from vocseg.cli.data import fetch_for

                fetch_for(read)
        from vocseg import run
        from vocseg.cli import reporters
        from vocseg.distributed import end_process

        reporter = reporters.choose(quiet=quiet, as_json=as_json)
        if read is not None:
            _follow(reporter, run.start(read, out=out or Path("runs"), device=device))
        elif resume is not None:
            _follow(reporter, run.resume(resume, device=device, overrides=overrides, data=data))
        end_process()


def _follow(reporter: Any, events: Iterator[Any]) -> None:
    """Prints what a run tells.

    Raises:
        EnvironmentFault: nobody takes what is printed any more.
    """
    from vocseg.errors import EnvironmentFault, Problem, how_to_go_on
    from vocseg.run import Started

    run = Path()

    def noted() -> Iterator[Any]:
        nonlocal run
        for event in events:
            if isinstance(event, Started):
                run = event.run
            yield event

    try:
        reporter.follow(noted())
    except OSError as error:  # the run's own have become vocseg's errors by then
        stopped = f"cannot be written to ({error.strerror}), which stopped the run; {how_to_go_on(run)}"
        raise EnvironmentFault(Problem("output", stopped)) from error
