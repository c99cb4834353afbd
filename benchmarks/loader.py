"""What the loader costs beyond the samples it loads, and how long an epoch's first batch is waited for.

    python benchmarks/loader.py [--rounds 5] [--data DIR] > loader.json

CPU per image: the loader's threads against the in-process pipeline, a plain `for` that makes the same samples and
stacks them; from files, and from the decoded cache. Work counts on whichever core and in whichever process it is done.
Cores share caches and memory and slow each other down, so what as many threads as cores take is compared with as many
plain loops at once, each a process of its own.

Epoch turnover: how much longer than for any other batch one waits for the first batch of an epoch. The one who waits
does so as training does: it is busy elsewhere for half as long again as the loader needs for a batch (a loader that
does not keep up is waited for at every batch, whatever it does between epochs).

`--data` is a folder with VOCdevkit/VOC2007; without it photographs of VOC's size are drawn. Checked first: two epochs
of batches, pixels and order, are the same with 1, 2 and 4 threads, from files and from the cache.
"""

# ruff: noqa: E402 - settings of the process come before torch

import hashlib
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from measure import arguments, draw_voc, environment, report

from vocseg.process import prepare_process

prepare_process()  # as `vocseg run` does, before torch is imported

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vocseg.build import build
from vocseg.data.loader import TrainingBatches
from vocseg.recipe.prepare import load_recipe

RECIPE = """
[model]
name = "mini_unet"

[data]
name = "voc"
year = 2007
repeat = {repeat}

[[augmentation]]
name = "random_scale"

[[augmentation]]
name = "horizontal_flip"

[[augmentation]]
name = "crop"
size = 320

[train]
epochs = 1
"""

SHOWN = 128  # images an epoch, at least
WORKERS = len(os.sched_getaffinity(0))
EPOCHS = 5  # of which turnover is measured between each and the next


class Samples(Dataset):
    """The same samples, for torch's own loader."""

    def __init__(self, batches: TrainingBatches, count: int):
        self.batches, self.count = batches, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        return self.batches.sample(0, position)


def batches_of(recipe: Path, root: Path, **data: Any) -> TrainingBatches:
    overrides = [f"data.{key}={json.dumps(value)}" for key, value in data.items()]
    return build(load_recipe(str(recipe), overrides=overrides, data=root)[0], "cpu").training.batches


def digest(batches: TrainingBatches) -> str:
    found = hashlib.sha256()
    for batch in batches.epochs(0, 2):
        for tensor in batch:
            found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def in_process(batches: TrainingBatches) -> None:
    order = np.random.default_rng(0).permutation(len(batches) * batches.batch_size)
    for positions in order.reshape(-1, batches.batch_size).tolist():
        pairs = [batches.sample(0, position) for position in positions]
        _ = torch.from_numpy(np.stack([image for image, _ in pairs]))
        _ = torch.from_numpy(np.stack([mask for _, mask in pairs]))


def consume(batches: Iterator[Any]) -> None:
    for _ in batches:
        pass


def data_loader(batches: TrainingBatches, persistent: bool = False) -> DataLoader:
    samples = Samples(batches, len(batches) * batches.batch_size)
    return DataLoader(samples, batches.batch_size, shuffle=True, num_workers=WORKERS, persistent_workers=persistent)


def cpu_seconds() -> float:
    """User and system time of this process, all its threads, and of the processes it has waited for."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def at_once(pool: ProcessPoolExecutor) -> Callable[[], float]:
    """A plain loop on each core, and what the two took on average."""
    return lambda: statistics.mean(pool.map(_timed, range(WORKERS)))


def _timed(_: int) -> float:
    begun = time.process_time()
    in_process(_loops)
    return time.process_time() - begun


_loops: TrainingBatches  # what the processes that run plain loops at once have in common with this one


def cost(recipe: Path, root: Path, cache: str, rounds: int) -> dict[str, Any]:
    """CPU per image, for batches of 8."""
    global _loops
    one, all_cores = (batches_of(recipe, root, cache=cache, workers=workers) for workers in (1, WORKERS))
    for batches in (one, all_cores):
        consume(batches.epochs(0, 1))
    _loops = one
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("fork")) as pool:

        def seconds_of(run: Callable[[], Any]) -> Callable[[], float]:
            def timed() -> float:
                begun = cpu_seconds()
                run()
                return cpu_seconds() - begun

            return timed

        sides = {
            "plain loop": seconds_of(lambda: in_process(one)),
            f"{WORKERS} plain loops at once": at_once(pool),
            "vocseg, 1 thread": seconds_of(lambda: consume(one.epochs(0, 1))),
            f"vocseg, {WORKERS} threads": seconds_of(lambda: consume(all_cores.epochs(0, 1))),
            f"torch DataLoader, {WORKERS} workers": seconds_of(lambda: consume(iter(data_loader(all_cores)))),
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(rounds + 1):
            for name, run in sides.items():
                taken = run()
                if number:
                    times[name].append(taken)
    milliseconds = {
        name: 1000 * statistics.median(taken) / (len(one) * one.batch_size) for name, taken in times.items()
    }
    alone, together, *others = milliseconds
    return {
        "ms_per_image": {name: round(value, 3) for name, value in milliseconds.items()},
        "times_plain_loop": {
            name: round(milliseconds[name] / milliseconds[alone if "1 thread" in name else together], 3)
            for name in others
        },
    }


def turnover(each: Callable[[], Iterator[Any]], per_epoch: int, busy: float) -> dict[str, float]:
    """Milliseconds that batches are waited for, `busy` seconds after the one before: first ones and others."""
    first: list[float] = []
    others: list[float] = []
    stream = each()
    next(stream)
    for number in range(1, EPOCHS * per_epoch):
        time.sleep(busy)
        begun = time.perf_counter()
        next(stream)
        (others if number % per_epoch else first).append(1000 * (time.perf_counter() - begun))
    usual = statistics.median(others)
    return {"first_ms": round(statistics.median(first) - usual, 1), "worst_first_ms": round(max(first) - usual, 1),
            "others_ms": round(usual, 1)}  # fmt: skip


def turnovers(recipe: Path, root: Path, cache: str, batch_size: int) -> dict[str, Any]:
    batches = batches_of(recipe, root, cache=cache, batch_size=batch_size, workers=WORKERS)
    consume(batches.epochs(0, 1))
    begun = time.perf_counter()
    consume(batches.epochs(0, 1))
    busy = 1.5 * (time.perf_counter() - begun) / len(batches)

    def torch_loader(persistent: bool) -> Iterator[Any]:
        loader = data_loader(batches, persistent)
        for _ in range(EPOCHS):
            yield from loader

    return {
        "busy_ms": round(1000 * busy, 1),
        "vocseg": turnover(lambda: batches.epochs(0, EPOCHS), len(batches), busy),
        "torch DataLoader": turnover(lambda: torch_loader(False), len(batches), busy),
        "torch DataLoader, persistent workers": turnover(lambda: torch_loader(True), len(batches), busy),
    }


def main() -> None:
    asked = arguments(__doc__, rounds=5, data=None)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = asked.data or draw_voc(Path(folder), images=64)
        names = (root / "VOCdevkit/VOC2007/ImageSets/Segmentation/train.txt").read_text().split()
        recipe = Path(folder) / "loader.toml"
        recipe.write_text(RECIPE.format(repeat=-(-SHOWN // len(names))))
        digests = {
            (cache, workers): digest(batches_of(recipe, root, cache=cache, workers=workers))
            for cache in ("off", "auto")
            for workers in (1, 2, 4)
        }
        if len(set(digests.values())) != 1:
            sys.exit(f"the batches depend on the number of threads, or on the cache: {digests}")
        report(
            environment=environment(),
            condition="order and pixels of two epochs are the same with 1, 2 and 4 threads, from files and cache",
            images=len(names),
            from_files=cost(recipe, root, "off", asked.rounds),
            from_cache=cost(recipe, root, "auto", asked.rounds),
            turnover={
                f"{source}, batch {size}": turnovers(recipe, root, cache, size)
                for source, cache in (("files", "off"), ("cache", "auto"))
                for size in (8, 32)
            },
        )


if __name__ == "__main__":
    main()
