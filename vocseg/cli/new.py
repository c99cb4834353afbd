"""`vocseg new`: the files of a plugin of one's own."""

from pathlib import Path

import click

from vocseg.cli import options
from vocseg.cli.output import print_json, print_line
from vocseg.errors import shown_path
from vocseg.new import KINDS, write_new


@click.command("new")
@click.argument("kind", type=click.Choice(KINDS))
@click.argument("name")
@click.option("--from", "copied", metavar="NAME", help="Begin as a copy of this architecture, as in --from mini_unet.")
@click.option("--package", is_flag=True, help="Write an installable package, in a folder of its name.")
@options.as_json
def command(kind: str, name: str, copied: str | None, package: bool, as_json: bool) -> None:
    """Write a new plugin into this folder: plugins/NAME.py, a recipe that trains it, and a test.

    All of it works as written; what is there already is never overwritten.

    \b
    vocseg new architecture my_net
    vocseg new architecture my_unet --from mini_unet
    vocseg new loss my_loss --package
    """
    written = write_new(kind, name, Path.cwd(), copied=copied, package=package)
    files = [shown_path(path) for path in written.files]
    if as_json:
        print_json({"written": files, "next": written.commands})
        return
    for file in files:
        print_line(file)
    print_line()
    print_line("Next:")
    for line in written.commands:
        print_line(f"  {line}")
