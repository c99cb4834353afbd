"""CPU time of vocseg's quick commands, beyond what Python itself takes to start.

    python benchmarks/startup.py [--rounds 15] > startup.json

Each round runs every command once, one after the other. What counts is user and system time, which other work on the
machine disturbs less than the clock. Checked first: `--help` and `list` import none of torch, numpy and cv2.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys

HEAVY = ("torch", "numpy", "cv2")
COMMANDS = {
    "nothing": ["-c", "pass"],
    "vocseg --help": ["-m", "vocseg", "--help"],
    "vocseg list": ["-m", "vocseg", "list"],
    "vocseg list recipe": ["-m", "vocseg", "list", "recipe"],
    "vocseg show quickstart": ["-m", "vocseg", "show", "quickstart"],
}


def check_imports(argument: str) -> None:
    code = (
        f"import sys; sys.argv = ['vocseg', {argument!r}]\n"
        "from vocseg.cli import main\n"
        "try: main()\n"
        f"finally: print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert done.stderr.splitlines()[-1] == "[]", f"vocseg {argument} imports {done.stderr}"


def cpu_ms(arguments: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1000 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    for argument in ("--help", "list"):
        check_imports(argument)
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, arguments in COMMANDS.items():
            times[name].append(cpu_ms(arguments))
    nothing = statistics.median(times.pop("nothing"))
    beyond = {name: round(statistics.median(taken) - nothing, 1) for name, taken in times.items()}
    print(json.dumps({"python_ms": round(nothing, 1), "beyond_python_ms": beyond, "rounds": rounds}, indent=2))


if __name__ == "__main__":
    main()
