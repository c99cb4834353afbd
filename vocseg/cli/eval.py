"""`vocseg eval`: score a run's weights again."""

from pathlib import Path

import click

from vocseg.cli import options
from vocseg.cli.output import print_json, print_line


@click.command("eval")
@click.argument("run", type=options.FOLDER)
@options.data
@click.option("--split", metavar="NAME", help="Split to score; the run's validation split if left out.")
@options.device
@options.compiled
@options.as_json
def command(run: Path, data: Path | None, split: str | None, device: str, compiled: bool, as_json: bool) -> None:
    """Score the weights of RUN, a run folder, on a split of its data set.

    The figures go to RUN/eval-SPLIT.json too.
    """
    from vocseg.process import prepare_process

    prepare_process()
    from vocseg.cli.progress import follow, progress_bar
    from vocseg.cli.reporters import print_figures
    from vocseg.runs.files import without_nan, write_json
    from vocseg.score import score

    scoring = score(run, data=data, split=split, device=device, compiled=compiled, say=options.note)
    with progress_bar("scoring") as (advance, _):
        result = follow(scoring, lambda scored: advance(scored.done, scored.total))
    if as_json:
        print_json(without_nan(result), indent=None)
    else:
        print_figures(result)
    target = run / f"eval-{result['split'].replace('/', '_')}.json"
    write_json(target, result)
    if not as_json:
        print_line(str(target))
