"""What a runner costs a step over a bare loop: milliseconds of CPU, for vocseg and for others' runners.

    python benchmarks/overhead.py [--rounds 5] [--steps 1000] > overhead.json

The network is one 1x1 convolution on 8 x 8 pixels and the batches lie in memory, so that what is left is the runner:
its logging, its progress display, its checkpoints as they are by default. Everyone has the same network, loss,
optimizer and schedule, one thread, and a terminal to write to (a pseudo-terminal; what is written is thrown away). Time
is taken by the batches themselves, from one batch asked for to a later one: starting and ending do not count.

A runner that waits for the device at every step, as most do to log the loss, pays for that on a GPU only; a runner that
sleeps (mmengine, two seconds an epoch) does not pay here either, since it is CPU time that counts.

Checked first: the losses of vocseg's steps are those of the bare loop, bit for bit. Of the others it is only said.
"""

import contextlib
import fcntl
import logging
import os
import pty
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from measure import arguments, environment, peers, report

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
os.environ["TERM"] = "xterm-256color"

import torch
from torch import Tensor, nn

from vocseg import run
from vocseg.build import Job, build
from vocseg.cli.reporters import Live, Plain
from vocseg.recipe.prepare import load_recipe
from vocseg.recipe.reader import Recipe
from vocseg.runs.checkpoint import save_state
from vocseg.train.loop import Step

WARM = 50  # steps before the clock starts
BATCH = 2

PLUGIN = '''
"""The smallest network there is."""
from torch import nn
from vocseg import architecture

@architecture
def pointwise(num_classes: int) -> nn.Module:
    """One 1x1 convolution."""
    network = nn.Conv2d(3, num_classes, 1)
    network.stride = 1
    return network
'''

RECIPE = """
[model]
name = "pointwise"

[data]
name = "synthetic"
images = {images}
val_images = 1
batch_size = {batch}
normalize = "imagenet"

[[loss]]
name = "cross_entropy"

[optimizer]
name = "adamw"

[schedule]
name = "poly"

[train]
epochs = 1
precision = "fp32"
"""


@dataclass
class Batches:
    """A few batches of uint8 pixels (b, h, w, 3) and labels (b, h, w) over and over, and the time that they took.

    Attributes:
        form: what to make of pixels and labels; done before the clock starts.
        seconds: of CPU a step, once all batches have been asked for.
    """

    steps: int
    form: Callable[[Tensor, Tensor], Any] = lambda pixels, labels: (pixels, labels)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randint, dtype=torch.uint8, generator=generator)
        self.drawn = [self.form(draw(256, (BATCH, 8, 8, 3)), draw(7, (BATCH, 8, 8))) for _ in range(16)]

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        begun = 0.0
        for step in range(self.steps):
            if step == WARM:
                begun = time.process_time()
            if step == self.steps - 1:
                self.seconds = (time.process_time() - begun) / (step - WARM)
            yield self.drawn[step % len(self.drawn)]

    def epochs(self, first: int, stop: int, **more: Any) -> Iterator[Any]:
        """What vocseg's loop asks its loader for."""
        return iter(self)


@dataclass
class Loss:
    """The loss, noting its values where that is asked for."""

    function: Callable[[Tensor, Tensor], Tensor]
    values: list[float] | None = None

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        value = self.function(logits, labels.long())
        if self.values is not None:
            self.values.append(value.item())
        return value


class Normalized(nn.Module):
    """The network of the recipe, with what vocseg does to pixels before it: for those who have no such step."""

    def __init__(self, job: Job):
        super().__init__()
        self.network, self.normalize = job.network.module, job.training.normalization

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network(self.normalize(pixels))


class WithLoss(nn.Module):
    """The same, giving the loss."""

    def __init__(self, setting: "Setting"):
        super().__init__()
        self.network, self.loss = Normalized(setting.job), setting.loss

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(self.network(pixels), labels)}


@dataclass
class Setting:
    """One side's run: everything new, from the same seed."""

    recipe: Recipe
    steps: int
    out: Path
    values: list[float] | None = None
    job: Job = field(init=False)
    loss: Loss = field(init=False)

    def __post_init__(self) -> None:
        self.job = build(self.recipe, "cpu")
        self.loss = Loss(self.job.loss, self.values)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.job.training.optimizer

    def scheduler(self) -> torch.optim.lr_scheduler.LambdaLR:
        return torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.job.training.schedule)


# Each side below takes a setting, trains one epoch and returns its batches.


def bare_loop(setting: Setting) -> Batches:
    batches, optimizer, loss = Batches(setting.steps), setting.optimizer, setting.loss
    network, schedule = Normalized(setting.job).train(), setting.job.training.schedule
    base = optimizer.param_groups[0]["lr"]
    for step, (pixels, labels) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = base * schedule(step)
        optimizer.zero_grad()
        loss(network(pixels), labels).backward()
        optimizer.step()
    return batches


def vocseg_with(reporter: Plain | Live, setting: Setting) -> Batches:
    """All of `vocseg run` but for its loader, from the recipe to the last step."""
    batches = Batches(setting.steps)
    setting.job.training.batches = batches  # type: ignore[assignment]
    setting.job.training.loss = setting.loss

    def training() -> Iterator[run.Event]:
        trained = False
        for event in run.start(setting.recipe, out=setting.out, device="cpu"):
            trained = trained or isinstance(event, Step)
            if trained and not isinstance(event, Step):
                return  # the validation
            yield event

    run.build = lambda *_, **__: setting.job  # so that the batches are ours
    try:
        reporter.follow(training())
    finally:
        run.build = build
    return batches


def torchvision_references() -> Callable[[Setting], Batches]:
    """The loop of torchvision's references/segmentation/train.py, which is no package: what it does at each step."""

    from peer_torchvision import Smoothed, logged

    def train(setting: Setting) -> Batches:
        batches, optimizer, scheduler = Batches(setting.steps), setting.optimizer, setting.scheduler()
        network, device = Normalized(setting.job).train(), torch.device("cpu")
        meters: dict[str, Smoothed] = defaultdict(Smoothed)
        meters["lr"] = Smoothed(window=1, form="{value}")
        for image, target in logged(batches, 10, "Epoch: [0]", meters):
            image, target = image.to(device), target.to(device)
            with torch.amp.autocast("cuda", enabled=False):
                loss = setting.loss(network(image), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            for name, value in {"loss": loss.item(), "lr": optimizer.param_groups[0]["lr"]}.items():
                meters[name].update(value)
        return batches

    return train


def lightning() -> Callable[[Setting], Batches]:
    """`Trainer.fit` as it is by default: progress bar, CSV logger, a checkpoint an epoch; the module logs its loss."""
    import lightning
    from lightning.pytorch.loggers import CSVLogger

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self, setting: Setting):
            super().__init__()
            self.network, self.setting = Normalized(setting.job), setting

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = self.setting.loss(self.network(batch[0]), batch[1])
            self.log("train_loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> Any:
            scheduler = {"scheduler": self.setting.scheduler(), "interval": "step"}
            return {"optimizer": self.setting.optimizer, "lr_scheduler": scheduler}

    def train(setting: Setting) -> Batches:
        batches = Batches(setting.steps)
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=CSVLogger(setting.out), enable_model_summary=False
        )
        trainer.fit(Module(setting), batches)
        return batches

    return train


def accelerate() -> Callable[[Setting], Batches]:
    """The loop of accelerate's examples with tqdm, which its users add; the loss is kept, not shown at each step."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader, IterableDataset
    from tqdm import tqdm

    class Source(IterableDataset):
        def __init__(self, batches: Batches):
            self.batches = batches

        def __iter__(self) -> Iterator[Any]:
            return iter(self.batches)

        def __len__(self) -> int:
            return len(self.batches)

    def train(setting: Setting) -> Batches:
        batches = Batches(setting.steps)
        accelerator = Accelerator(cpu=True)
        network, optimizer, loader, scheduler = accelerator.prepare(
            Normalized(setting.job), setting.optimizer, DataLoader(Source(batches), None), setting.scheduler()
        )
        network.train()
        total = torch.zeros(())
        for pixels, labels in tqdm(loader):
            loss = setting.loss(network(pixels), labels)
            total += loss.detach().float()
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return batches

    return train


def hugging_face_trainer() -> Callable[[Setting], Batches]:
    """transformers' Trainer as it is by default, but for clipping, which no other does: logs and saves every 500."""
    import transformers

    class Trainer(transformers.Trainer):
        batches: Batches

        def get_train_dataloader(self) -> Any:
            return self.batches

    def train(setting: Setting) -> Batches:
        batches = Batches(setting.steps, form=lambda pixels, labels: {"pixels": pixels, "labels": labels})
        settings = transformers.TrainingArguments(
            str(setting.out), num_train_epochs=1, max_grad_norm=0.0, use_cpu=True, report_to="none"
        )
        network = WithLoss(setting)
        trainer = Trainer(network, settings, optimizers=(setting.optimizer, setting.scheduler()))
        trainer.batches = batches
        trainer.train()
        return batches

    return train


def mmengine() -> Callable[[Setting], Batches]:
    """mmengine's Runner with its default hooks, logging every 50 iterations as mmsegmentation's configurations do."""
    from mmengine.model import BaseModel
    from mmengine.optim import OptimWrapper
    from mmengine.optim.scheduler import PolyLR
    from mmengine.runner import Runner
    from torch.utils.data import DataLoader, IterableDataset

    class Source(IterableDataset):
        def __init__(self, batches: Batches):
            self.batches = batches

        def __iter__(self) -> Iterator[Any]:
            return iter(self.batches)

        def __len__(self) -> int:
            return len(self.batches)

    class Model(BaseModel):
        def __init__(self, setting: Setting):
            super().__init__()
            self.network = WithLoss(setting)

        def forward(self, pixels: Tensor, labels: Tensor, mode: str = "loss") -> dict[str, Tensor]:
            return self.network(pixels, labels)

    def train(setting: Setting) -> Batches:
        batches = Batches(setting.steps)
        Runner(
            Model(setting),
            work_dir=str(setting.out),
            train_dataloader=DataLoader(Source(batches), None),
            train_cfg={"by_epoch": False, "max_iters": setting.steps, "val_interval": 10**9},
            optim_wrapper=OptimWrapper(setting.optimizer),
            param_scheduler=PolyLR(setting.optimizer, power=0.9, begin=0, end=setting.steps, by_epoch=False),
            default_hooks={"logger": {"type": "LoggerHook", "interval": 50}, "sampler_seed": None},
            experiment_name=setting.out.name,
        ).train()
        return batches

    return train


PEERS = {
    "torchvision references": torchvision_references,
    "Lightning": lightning,
    "accelerate": accelerate,
    "Hugging Face Trainer": hugging_face_trainer,
    "mmengine": mmengine,
}


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """A terminal of 100 columns for standard output and error, whose reader throws everything away."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with subprocess.Popen(["cat"], stdin=reader, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as sink:
        with _output_to(writer):
            os.close(writer)
            yield
        os.close(reader)
        sink.kill()


@contextlib.contextmanager
def no_terminal() -> Iterator[None]:
    """Standard output and error into a file that keeps nothing, as in a job without a terminal."""
    writer = os.open(os.devnull, os.O_WRONLY)
    with _output_to(writer):
        os.close(writer)
        yield


@contextlib.contextmanager
def _output_to(descriptor: int) -> Iterator[None]:
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for place, descriptor in zip((1, 2), kept, strict=True):
            os.dup2(descriptor, place)
            os.close(descriptor)


def recipe_of(folder: Path, steps: int) -> Recipe:
    (folder / "plugins").mkdir()
    (folder / "plugins" / "pointwise.py").write_text(PLUGIN)
    path = folder / "overhead.toml"
    path.write_text(RECIPE.format(images=steps * BATCH, batch=BATCH))
    return load_recipe(str(path))[0]


def save_milliseconds(setting: Setting) -> float:
    """What a checkpoint of this network costs, of which vocseg writes one a minute."""
    begun = time.process_time()
    for step in range(20):
        save_state(setting.out, {"training": setting.job.training.state(), "scoreboard": {}}, step)
    return 1000 * (time.process_time() - begun) / 20


def main() -> None:
    asked = arguments(__doc__, rounds=5, steps=1000)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found, missing = peers(PEERS)
    sides: dict[str, tuple[Callable[[Setting], Batches], Any]] = {
        "bare loop": (bare_loop, terminal),
        "vocseg, plain lines": (partial(vocseg_with, Plain()), no_terminal),
        "vocseg, live display": (partial(vocseg_with, Live()), terminal),
        **{name: (train, terminal) for name, train in found.items()},
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        recipe = recipe_of(root, asked.steps)
        for number in range(-1, asked.rounds):
            for name, (train, output) in sides.items():
                out = root / f"{len(times[name])}-{name.replace(' ', '-')}-{number}"
                out.mkdir()
                setting = Setting(recipe, asked.steps, out, losses[name] if number < 0 else None)
                with output():
                    batches = train(setting)
                if number >= 0:  # the first round is for the losses
                    times[name].append(1000 * batches.seconds)
            if number < 0:
                for name in sides:
                    if name.startswith("vocseg") and losses[name] != losses["bare loop"]:
                        sys.exit(f"{name}: the losses are not the bare loop's")
        saving = save_milliseconds(setting)
    milliseconds = {name: statistics.median(taken) for name, taken in times.items()}
    bare = milliseconds["bare loop"]
    report(
        environment=environment("lightning", "accelerate", "transformers", "mmengine"),
        condition=f"{asked.steps} losses of vocseg's are the bare loop's, bit for bit (fp32, one thread)",
        losses_equal_bare_loop={name: values == losses["bare loop"] for name, values in losses.items()},
        bare_loop_ms=round(bare, 4),
        overhead_ms={name: round(value - bare, 4) for name, value in milliseconds.items() if name != "bare loop"},
        vocseg_checkpoint_ms=round(saving, 3),
        steps=asked.steps,
        rounds=asked.rounds,
        missing=missing,
    )


if __name__ == "__main__":
    main()
