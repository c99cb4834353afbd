"""A whole run, one epoch and a validation from files to mIoU in a fresh process: `vocseg run` and its peers' programs.

    python benchmarks/whole_run.py [--rounds 3] [--data DIR] [--sides vocseg,Lightning] > whole_run.json

All train smp's U-Net on ResNet34 from scratch, on images scaled by 0.5 to 2, mirrored and cropped, with AdamW, poly and
cross-entropy, and score the validation images at their own size. Beyond that each does what its user gets who changes
nothing else: precision, threads, logging, checkpoints (vocseg's run folder with its pictures too). A peer loads images
with --workers processes, but the Hugging Face Trainer, whose default is none. What counts is user and system time,
child processes included, from starting Python to its end: what spins while it waits is counted, what sleeps is not.

`--data` is a folder with VOCdevkit/VOC2007, of which the first --train and --val images of the splits are taken;
without it photographs of VOC's size are drawn. Checked in the first round: vocseg's mIoU is not further from a peer's
than --tolerance. After so few steps from scratch every mIoU is next to that of background alone, and validation losses,
which are given too, differ from seed to seed by more than from program to program.

--prefix is a command to start each program with, such as "taskset --cpu-list 0,1"; where it has to wait, the wall-clock
seconds count that too.
"""

import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import arguments, draw_voc, environment, report

RECIPE = """
[model]
name = "smp"
decoder = "Unet"
encoder = "resnet34"

[data]
name = "voc"
year = 2007
batch_size = {batch}
normalize = "imagenet"

[[augmentation]]
name = "random_scale"
scale = [0.5, 2.0]

[[augmentation]]
name = "horizontal_flip"

[[augmentation]]
name = "crop"
size = {crop}

[[loss]]
name = "cross_entropy"

[optimizer]
name = "adamw"
lr = {lr}
weight_decay = {decay}

[schedule]
name = "poly"

[train]
epochs = 1
"""

PEERS = {
    "torchvision references": ("peer_torchvision.py", "torchvision"),
    "Lightning": ("peer_lightning.py", "lightning"),
    "accelerate": ("peer_accelerate.py", "accelerate"),
    "Hugging Face Trainer": ("peer_trainer.py", "transformers"),
    "mmsegmentation": ("peer_mmsegmentation.py", "mmsegmentation"),
}
LR, DECAY = 1e-3, 0.01

Ran = dict[str, Any]
"""Of one run: CPU seconds, wall-clock seconds, mIoU and validation loss."""


def ran(command: list[str], prefix: str, figures: Callable[[str], tuple[float, float | None]]) -> Ran:
    """Runs a program as its user would, without settings for threads from outside."""
    free = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "MKL_", "MALLOC_"))}
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([*shlex.split(prefix), *command], capture_output=True, text=True, env=free)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1])
    miou, val_loss = figures(done.stdout)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu": cpu, "wall": time.perf_counter() - begun, "miou": miou, "val_loss": val_loss}


def vocseg(asked: Any, root: Path, out: Path, checking: bool, *more: str) -> Ran:
    recipe = out / "whole.toml"
    recipe.write_text(RECIPE.format(batch=asked.batch, crop=asked.crop, lr=LR, decay=DECAY))

    def figures(output: str) -> tuple[float, float]:
        folder = Path(output.splitlines()[-1])  # absolute, as --out is
        epoch = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        return epoch["miou"], epoch["val_loss"]

    command = [sys.executable, "-m", "vocseg", "run", str(recipe), "--data", str(root), "--out", str(out / "runs")]
    return ran([*command, *more], asked.prefix, figures)


def peer(script: str, asked: Any, root: Path, out: Path, checking: bool) -> Ran:
    def figures(output: str) -> tuple[float, float | None]:
        found = json.loads(output.splitlines()[-1])
        return found["miou"], found["val_loss"]

    given = {"root": root, "out": out, "lr": LR, "decay": DECAY}
    given |= {name: getattr(asked, name) for name in ("crop", "batch", "workers")}
    options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    path = str(Path(__file__).with_name(script))
    command = [sys.executable, "-W", "ignore", path, *options, *(["--val-loss"] if checking else [])]
    return ran(command, asked.prefix, figures)


def first_images(data: Path, root: Path, counts: dict[str, int]) -> Path:
    """The first images of each split, in a folder that looks like `data`."""
    folder, source = root / "VOCdevkit/VOC2007", data.absolute() / "VOCdevkit/VOC2007"
    lists = folder / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for part in ("JPEGImages", "SegmentationClass"):
        (folder / part).symlink_to(source / part)
    for split, count in counts.items():
        names = (source / f"ImageSets/Segmentation/{split}.txt").read_text().split()[:count]
        (lists / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root


def main() -> None:
    sizes = {"train": 208, "val": 32, "crop": 224, "batch": 8, "workers": 2}
    asked = arguments(__doc__, rounds=3, data=None, sides="all", tolerance=0.02, prefix=" ", **sizes)
    sides: dict[str, Callable[..., Ran]] = {
        "vocseg": vocseg,
        "vocseg, fp32": lambda *given: vocseg(*given, "--set", "train.precision=fp32"),
    }
    missing = {}
    for name, (script, package) in PEERS.items():
        if environment(package)[package] == "not installed":
            missing[name] = "not installed"
        else:
            sides[name] = lambda *given, script=script: peer(script, *given)
    if asked.sides != "all":
        sides = {name: side for name, side in sides.items() if name in asked.sides.split(",")}
    runs: dict[str, list[Ran]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        counts = {"train": asked.train, "val": asked.val}
        data = asked.data or draw_voc(folder / "drawn", images=max(counts.values()))
        root = first_images(data, folder / "data", counts)
        for number in range(asked.rounds):
            for name, side in list(sides.items()):
                out = folder / f"{number}-{name.replace(' ', '-')}"
                out.mkdir()
                try:
                    runs[name].append(side(asked, root, out, number == 0))
                except RuntimeError as error:
                    missing[name] = f"cannot run: {error}"
                    del sides[name]
    first = {name: runs[name][0] for name in sides}
    apart = [
        f"{name}: mIoU {found['miou']:.3f}, vocseg's {first['vocseg']['miou']:.3f}"
        for name, found in first.items()
        if "vocseg" in first and abs(found["miou"] - first["vocseg"]["miou"]) > asked.tolerance
    ]
    if apart:
        sys.exit("; ".join(apart))
    # The first round may compute more: it counts where there is no other.
    counted = {name: found[1:] or found for name, found in runs.items() if name in sides}
    cpu = {name: statistics.median(run["cpu"] for run in found) for name, found in counted.items()}
    report(
        environment=environment("lightning", "accelerate", "transformers", "mmsegmentation"),
        setting={name: getattr(asked, name) for name in (*sizes, "rounds")},
        figures={name: {key: found[key] for key in ("miou", "val_loss")} for name, found in first.items()},
        cpu_seconds={name: round(value, 1) for name, value in cpu.items()},
        wall_seconds={
            name: round(statistics.median(run["wall"] for run in found), 1) for name, found in counted.items()
        },
        vocseg_share={name: round(cpu["vocseg"] / value, 2) for name, value in cpu.items()} if "vocseg" in cpu else {},
        missing=missing,
    )


if __name__ == "__main__":
    main()
