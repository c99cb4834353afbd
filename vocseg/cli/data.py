"""`vocseg data`: fetch, verify and describe data sets."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vocseg.cli import options
from vocseg.cli.output import print_json, print_line
from vocseg.cli.progress import progress_bar
from vocseg.errors import visible

if TYPE_CHECKING:
    from vocseg.data.dataset import Dataset
    from vocseg.data.stats import Stats
    from vocseg.recipe.reader import Recipe

splits = click.option("--split", "splits", multiple=True, metavar="NAME", help="Only this split; may be given again.")


@click.group("data")
def command() -> None:
    """Fetch, verify and describe data sets."""


@command.command()
@click.argument("name", type=click.Choice(["voc2007", "voc2012", "sbd"]))
@click.option(
    "--data",
    type=options.FOLDER,
    envvar="VOCSEG_DATA",
    default="data",
    show_default=True,
    metavar="DIR",
    help="Folder to hold VOCdevkit.",
)
def fetch(name: str, data: Path) -> None:
    """Download NAME into the data folder, check it and unpack it.

    \b
    voc2007   train 209, val 213, test 210 images; 911 MB to download
    voc2012   train 1,464, val 1,449 images; 2.0 GB to download
    sbd       trainaug 10,582 images of VOC 2012; 1.4 GB, and voc2012

    What is there already is not downloaded again, and a download that broke off is gone on with. Without a network,
    put the archives themselves into the folder.
    """
    from vocseg.data.fetch import fetch

    with progress_bar("downloading", in_bytes=True) as (progress, say):
        done = fetch(name, data, progress, say=say)
    what = f"unpacked {', '.join(done)}" if done else "nothing was missing"
    print_line(f"{name} is complete in {data}: {what}")


@command.command()
@click.argument("target")
@splits
@options.data
@options.overrides
@options.plugins
@options.as_json
@click.pass_context
def verify(
    context: click.Context,
    target: str,
    splits: tuple[str, ...],
    data: Path | None,
    overrides: tuple[str, ...],
    plugins: Path | None,
    as_json: bool,
) -> None:
    """Read every image and mask of TARGET: a recipe, or voc2007 to voc2012.

    Reports, each with its file, what is missing or cannot be read, masks of another size than their image, unknown
    ids, and images that are in two splits. Exits with 3 if there is any of that; remarks do not count.
    """
    from dataclasses import asdict

    from vocseg.data.verify import verify
    from vocseg.errors import DataError

    opened = _open(target, splits, data, overrides, plugins, incomplete=True)
    with progress_bar("reading") as (progress, _):
        findings = verify(opened, progress)
    if as_json:
        images = {split: len(dataset) for split, dataset in opened.items()}
        print_json({"images": images, **asdict(findings)})
        context.exit(DataError.exit_code if findings.problems else 0)
    for remark in findings.remarks:
        print_line(f"remark: {remark}")
    if findings.problems:
        raise DataError(*findings.problems)
    read = ", ".join(f"{split} {len(dataset):,}" for split, dataset in opened.items())
    print_line(f"no problems in {sum(map(len, opened.values())):,} images ({read})")


@command.command()
@click.argument("target")
@splits
@options.data
@options.overrides
@options.plugins
@options.as_json
@click.option("--out", type=options.FOLDER, metavar="FILE", help="Draw a picture too: FILE ends in .png, .svg or .pdf.")
def stats(
    target: str,
    splits: tuple[str, ...],
    data: Path | None,
    overrides: tuple[str, ...],
    plugins: Path | None,
    as_json: bool,
    out: Path | None,
) -> None:
    """Count images and pixels per class in TARGET: a recipe, or voc2007 to voc2012."""
    from vocseg.data.stats import stats
    from vocseg.errors import EnvironmentFault, Problem, UsageError

    if out and out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--out {out}: expected a file that ends in .png, .svg or .pdf")
    counted = {}
    for split, dataset in _open(target, splits, data, overrides, plugins).items():
        with progress_bar(f"counting {split}") as (progress, _):
            counted[split] = stats(dataset, progress)
    if out:
        from vocseg.report.dataset import draw_stats

        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            draw_stats(counted, out)
        except OSError as error:
            raise EnvironmentFault(Problem(str(out), f"cannot be written: {error.strerror or error}")) from error
    if as_json:
        print_json({split: _as_json(counts) for split, counts in counted.items()})
    else:
        _print_table(counted)


def fetch_for(recipe: "Recipe") -> None:
    """Fetches what a recipe trains and scores on (`vocseg run --fetch`); does nothing where it is there.

    Raises:
        UsageError: the recipe's data set is none that can be fetched.
    """
    from vocseg.data.fetch import ARCHIVES, fetch
    from vocseg.errors import Problem, UsageError

    data = recipe.data
    name = f"{data.name}{data.params.get('year', '')}"
    if name not in ARCHIVES:
        known = ", ".join(ARCHIVES)
        raise UsageError(Problem("--fetch", f"the recipe's data set '{name}' cannot be fetched; known: {known}"))
    augmented = "trainaug" in (data.settings.train, data.settings.val)
    with progress_bar("downloading", in_bytes=True) as (progress, say):
        fetch("sbd" if augmented else name, Path(data.settings.root), progress, say=say)


def _open(
    target: str,
    splits: tuple[str, ...],
    data: Path | None,
    overrides: tuple[str, ...],
    plugins: Path | None,
    incomplete: bool = False,
) -> dict[str, "Dataset"]:
    from vocseg.build import open_datasets

    return open_datasets(
        target, data=data, overrides=overrides, plugins=plugins, splits=splits or None, incomplete=incomplete
    )


def _as_json(counts: "Stats") -> dict[str, object]:
    return {
        "images": counts.images,
        "labelled_pixels": counts.labelled_pixels,
        "void_pixels": counts.void_pixels,
        "void_share": counts.void_share,
        "heights": counts.heights._asdict(),
        "widths": counts.widths._asdict(),
        "classes": {
            name: {"images": images, "pixels": pixels, "pixel_share": share}
            for name, images, pixels, share in zip(
                counts.classes, counts.class_images, counts.class_pixels, counts.pixel_shares, strict=True
            )
        },
    }


def _print_table(splits: dict[str, "Stats"]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("class", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for split in splits:
        for column in ("images", "pixels", "share"):
            table.add_column(f"{escape(visible(split))}\n{column}", justify="right", no_wrap=True)
    some = next(iter(splits.values()))
    for i, name in enumerate(some.classes):
        cells = (
            (f"{s.class_images[i]:,}", f"{s.class_pixels[i]:,}", f"{s.pixel_shares[i]:.2%}") for s in splits.values()
        )
        table.add_row(escape(visible(name)), *(cell for three in cells for cell in three))
    table.add_section()
    void = (("", f"{s.void_pixels:,}", f"{s.void_share:.2%}") for s in splits.values())
    table.add_row("void (of all pixels)", *(cell for three in void for cell in three))
    console = Console(emoji=False)
    if not console.is_terminal:
        console.width = 40 + 40 * len(splits)  # a file has no width to fit into
    console.print(table)
    for split, s in splits.items():
        console.print(
            f"{visible(split)}: {s.images:,} images, "
            f"width {s.widths.min} to {s.widths.max}, median {s.widths.median:g}; "
            f"height {s.heights.min} to {s.heights.max}, median {s.heights.median:g}",
            markup=False,
            highlight=False,
        )
