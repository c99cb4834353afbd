"""CPU time of vocseg's quick commands and of its peers' --help, beyond what Python itself takes to start.

    python benchmarks/startup.py [--rounds 15] [--peer-rounds 3] > startup.json

Each round runs every command once, one after the other. What counts is user and system time, which other work on the
machine disturbs less than the clock. Checked first: `--help` and `list` import none of torch, numpy and cv2.
The peers are those whose command lines are installed beside the Python that runs this.
"""

import importlib.util
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

from measure import alternate, arguments, environment, peers, report, times_faster

HEAVY = ("torch", "numpy", "cv2")
COMMANDS = {
    "nothing": ["-c", "pass"],
    "vocseg --help": ["-m", "vocseg", "--help"],
    "vocseg list": ["-m", "vocseg", "list"],
    "vocseg list recipe": ["-m", "vocseg", "list", "recipe"],
    "vocseg show quickstart": ["-m", "vocseg", "show", "quickstart"],
}
RUN_PATH = "import runpy, sys; sys.argv = [{path!r}, '--help']; runpy.run_path({path!r}, run_name='__main__')"


def check_imports(argument: str) -> None:
    code = (
        f"import sys; sys.argv = ['vocseg', {argument!r}]\n"
        "from vocseg.cli import main\n"
        "try: main()\n"
        f"finally: print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert done.stderr.splitlines()[-1] == "[]", f"vocseg {argument} imports {done.stderr}"


def script(name: str) -> list[str]:
    """The command of a peer, run by this Python."""
    path = Path(sys.executable).parent / name
    if not path.is_file():
        raise ImportError(f"no command {path}")
    return works([str(path), "--help"])


def mmsegmentation() -> list[str]:
    found = importlib.util.find_spec("mmseg")
    if found is None or found.origin is None:
        raise ImportError("no module named 'mmseg'")
    train = str(Path(found.origin).parent / ".mim" / "tools" / "train.py")
    # mmsegmentation 1.2.2 refuses mmcv 2.2 for its number alone.
    return works(["-c", f"import mmcv; mmcv.__version__ = '2.1.0'; {RUN_PATH.format(path=train)}"])


def works(command: list[str]) -> list[str]:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        raise ImportError(done.stderr.strip().splitlines()[-1])
    return command


def run(command: list[str]) -> None:
    subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)


def childrens_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def medians(commands: dict[str, list[str]], rounds: int) -> dict[str, float]:
    """Milliseconds of CPU of each command beyond those of `nothing`, which stands first."""
    seconds = alternate({name: partial(run, given) for name, given in commands.items()}, rounds, childrens_seconds)
    return {name: round(1000 * (taken - seconds["nothing"]), 1) for name, taken in seconds.items() if name != "nothing"}


def main() -> None:
    given = arguments(__doc__, rounds=15, peer_rounds=3)
    for argument in ("--help", "list"):
        check_imports(argument)
    others, missing = peers(
        {
            "Lightning (fabric)": partial(script, "fabric"),
            "accelerate": partial(script, "accelerate"),
            "transformers": partial(script, "transformers"),
            "mmsegmentation (tools/train.py)": mmsegmentation,
        }
    )
    beside = {name: COMMANDS[name] for name in ("nothing", "vocseg --help")} | others
    helps = medians(beside, given.peer_rounds) if others else {}
    report(
        **environment("click", "pydantic"),
        checked=f"--help and list import none of {', '.join(HEAVY)}",
        rounds=given.rounds,
        beyond_python_ms=medians(COMMANDS, given.rounds),
        peers_help_beyond_python_ms=helps,
        help_times_faster=times_faster(helps, "vocseg --help") if helps else {},
        missing=missing,
    )


if __name__ == "__main__":
    main()
