"""The command line. Each command is a file here that imports what it needs when it is called."""

import atexit
import contextlib
import gc
import importlib
import io
import os
import sys

import click

COMMANDS = {
    "run": "Train a recipe and write a run folder.",
    "list": "List components, or show one with its parameters.",
    "new": "Write a plugin to start from, with its recipe and test.",
    "show": "Print a recipe with every default filled in.",
    "check": "Try a recipe, or check that an architecture keeps its contract.",
    "lr": "Try learning rates, and draw the loss over them.",
    "eval": "Score a run's weights again.",
    "predict": "Segment images with a run's weights.",
    "data": "Fetch, verify and describe data sets.",
    "schema": "Print the JSON schema of recipes, for editors.",
}


# Once its file is imported, a command is a name here: `list` and `eval` are then no longer Python's.
class Commands(click.Group):
    """Finds a command's file by its name, so that `--help` and `list` import nothing heavy."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"vocseg.cli.{name}").command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple:
        if args and args[0] not in COMMANDS:
            from vocseg.errors import did_you_mean

            ctx.fail(f"no command is named '{args[0]}'{did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([*COMMANDS.items()])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="vocseg", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show a traceback with errors.")
def cli(debug: bool) -> None:
    """Compare semantic segmentation networks: a recipe in, a run folder out.

    \b
    Exit codes: 0 done, 2 usage or recipe, 3 data, 4 environment or storage,
    5 training failed, 129, 130 and 143 stopped by a closed terminal, Ctrl-C and SIGTERM.
    """


def main() -> None:
    """The entry point: runs a command, prints errors as lines on stderr, and exits with their code."""
    from vocseg.errors import Interrupted, Problem, VocsegError, one_line

    _open_closed_streams()
    atexit.register(_end_quickly)
    for stream in (sys.stdout, sys.stderr):  # a terminal or pipe that cannot show a letter is no reason to stop
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        # What a command leaves `Exit` with is returned; a command that runs to its end returns None.
        sys.exit(cli.main(args=arguments, prog_name="vocseg", standalone_mode=False))
    except VocsegError as error:
        if debug:
            raise
        if "--json" in arguments:
            from vocseg.cli.output import print_json

            with contextlib.suppress(OSError):  # that it cannot be printed may be the error
                print_json({"error": [str(p) for p in error.problems], "exit_code": error.exit_code}, indent=None)
        rank = os.environ.get("RANK", "0")  # torchrun's processes: what all of them find, the first one says
        if rank == "0" or not (error.exit_code == 2 or isinstance(error, Interrupted)):
            _say(*(problem if rank == "0" else f"process {rank}: {problem}" for problem in error.problems))
        sys.exit(error.exit_code)
    except click.ClickException as error:
        text = io.StringIO()
        error.show(text)
        _say(*(Problem("", line) for line in text.getvalue().splitlines()))
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        _say("stopped")
        sys.exit(130)
    except SystemExit as ended:
        if ended.code == 1:  # click's, for `vocseg list | head`: the reader has seen enough
            _end_output()
            ended.code = 0
        raise
    except (OSError, MemoryError, ImportError) as error:  # the machine's affair, wherever it came up
        if debug:
            raise
        reason = getattr(error, "strerror", None) or one_line(error) or "not enough memory"
        _say(Problem(str(getattr(error, "filename", None) or ""), f"{reason}; --debug shows where"))
        sys.exit(4)
    except Exception as error:
        if debug:
            raise
        reason = f"{type(error).__name__}: {one_line(error)}"
        _say(Problem("internal error", f"{reason}; please report it with the output of --debug"))
        sys.exit(1)


def _say(*lines: object) -> None:
    """Prints the lines that an error is; that this fails does not change the exit code."""
    for line in lines:
        with contextlib.suppress(OSError):
            click.echo(line, err=True)
    _end_output()


def _open_closed_streams() -> None:
    """Gives a process that was started with closed streams (`>&-`) ones that lead nowhere.

    Else Python has None in their place, and a file that is opened later gets the number to which libraries write.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # It takes the lowest free number, which is this one; and what is started from here has it too.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def _end_output() -> None:
    """Lets go of what cannot be printed, which Python would try once more when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # the second where somebody closed it
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _end_quickly() -> None:
    """Spares the last look for garbage, a tenth of a quick command's time; what torch is made of asks for that look."""
    if "torch" not in sys.modules:
        gc.freeze()
