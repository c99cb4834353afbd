"""`vocseg predict`: segment images."""

from pathlib import Path

import click

from vocseg.cli import options
from vocseg.cli.output import print_json, print_line


@click.command("predict")
@click.argument("run", type=options.FOLDER)
@click.argument("images", type=options.FOLDER, nargs=-1, required=True)
@click.option(
    "--out", type=options.FOLDER, metavar="DIR", help="Folder for masks and overlays; RUN/predictions if left out."
)
@options.device
@options.compiled
@options.as_json
def command(run: Path, images: tuple[Path, ...], out: Path | None, device: str, compiled: bool, as_json: bool) -> None:
    """Segment IMAGES, files or folders, with the weights of RUN.

    Each image gives NAME.png, a palette mask of class ids, and NAME_overlay.png to look at.
    """
    from vocseg.process import prepare_process

    prepare_process()
    from vocseg.cli.progress import progress_bar
    from vocseg.score import predict

    done = 0
    try:
        with progress_bar("predicting") as (advance, _):
            for predicted in predict(run, images, out=out, device=device, compiled=compiled, say=options.note):
                done = predicted.done
                advance(predicted.done, predicted.total)
                if as_json:
                    entry = {"image": predicted.source, "mask": predicted.mask, "overlay": predicted.overlay}
                    print_json({key: str(value) for key, value in entry.items()}, indent=None)
    finally:  # images that cannot be read are an error, and the others are segmented all the same
        if done and not as_json:
            print_line(f"{done} image{'' if done == 1 else 's'}: masks and overlays in {out or run / 'predictions'}")
