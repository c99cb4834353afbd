"""Time from `vocseg run` to all that is wrong with a recipe, on the clock and in CPU time.

    python benchmarks/recipe_errors.py [--rounds 9] > recipe_errors.json

One recipe has ten mistakes, of which one only shows when an augmentation is built; the other is shipped, and its data
is not there. Checked first: every problem is said, the exit code is 2 or 3, and torch is not imported. Beside it stands
what importing torch takes, before which a program that checks while it builds can say nothing.
"""

import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from measure import alternate, arguments, environment, report

RECIPE = """\
description = "Ten mistakes."
sed = 3                          # 1
[model]
name = "smpp"                    # 2
[data]
name = "synthetic"
batchsize = 4                    # 3
[[augmentation]]
name = "crop"
size = -3                        # 4
[[augmentation]]
name = "random_scale"
scale = [2.0, 0.5]               # 5
[[loss]]
name = "cross_entropy"
wieght = 2.0                     # 6
[optimizer]
name = "adamw"
lr = "fast"                      # 7
[train]
epocs = 3                        # 8
epochs = 10
precision = "fp16"               # 9
[early_stopping]
metric = "mIoU"                  # 10
"""
MISTAKES = (
    "sed: unknown key", "model.name: no architecture", "data.batchsize: unknown key", "augmentation.0.size: expected",
    "random_scale.scale: expected", "loss.0.wieght: unknown key", "optimizer.lr: expected", "train.epocs: unknown key",
    "train.precision: expected", "early_stopping.metric: expected",
)  # fmt: skip


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "VOCSEG_DATA"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=clean, capture_output=True, text=True)


def check(recipe: str, folder: Path, code: int, expected: tuple[str, ...]) -> None:
    done = run(["-X", "importtime", "-m", "vocseg", "run", recipe], folder)
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == code, done.stderr
    assert len(said) == len(expected), said
    for problem in expected:
        assert sum(problem in line for line in said) == 1, (problem, said)
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)


def childrens_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    given = arguments(__doc__, rounds=9)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "ten.toml").write_text(RECIPE)
        check("ten.toml", folder, 2, MISTAKES)
        check("transfer_resnet34", folder, 3, ("VOC2012: no such folder",))
        commands = {
            "ten mistakes": ["-m", "vocseg", "run", "ten.toml"],
            "missing data": ["-m", "vocseg", "run", "transfer_resnet34"],
            "import torch": ["-c", "import torch"],
        }
        sides = {name: partial(run, command, folder) for name, command in commands.items()}
        cpu, clock = (alternate(sides, given.rounds, timer) for timer in (childrens_seconds, time.perf_counter))
    report(
        **environment("pydantic"),
        checked="each of the ten mistakes and the missing folder is said once, and torch is not imported",
        rounds=given.rounds,
        cpu_seconds={name: round(value, 3) for name, value in cpu.items()},
        clock_seconds={name: round(value, 3) for name, value in clock.items()},
        below_0_3_seconds={name: max(cpu[name], clock[name]) < 0.3 for name in ("ten mistakes", "missing data")},
    )


if __name__ == "__main__":
    main()
