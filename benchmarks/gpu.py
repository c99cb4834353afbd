"""How busy a GPU is while vocseg trains on it, and how fast beside a bare loop and others' runners.

    python benchmarks/gpu.py [--steps 200] [--rounds 3] [--network unet] [--no-peers] [--data DIR] > gpu.json
    python benchmarks/gpu.py --device cpu --quick

The networks are U-Net on ResNet34 (512 x 512, batch 32) and DeepLabV3+ on ResNet101 (512 x 512, batch 16), trained from
JPEG files of VOC's size: scaled, cropped, flipped, colours changed, nothing cached. `--data` is a folder with
VOCdevkit/VOC2007; without it photographs are drawn. `--network` takes one of the two, `--steps` and `--rounds` shorten
it. Without a GPU it says so and ends. The second form runs every line of it on tiny sizes, to see that it works; its
figures say nothing.

A `bare loop` trains the same network with the same loss, optimizer, precision and memory layout on one batch that stays
on the device: nobody can be faster without changing the network. Everyone's time is wall clock between two steps, at
both of which the device was waited for. Others' runners get vocseg's own samples, from as many processes as there are
cores and in pinned memory, so that it is the runners that are compared; `at equal precision` they get bf16 too.

Checked first: no step and no scored image makes the host wait (`torch.cuda.set_sync_debug_mode("error")`); losses on
one batch are the bare loop's, to the bit on a CPU, within 5 % on a GPU; images that the device augments are the CPU's
within two grey levels for 99 % of all values, with equal labels.
"""

import contextlib
import gc
import io
import itertools
import logging
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from measure import arguments, draw_voc, environment, peers, report

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.utils.data import DataLoader, IterableDataset

from vocseg import run
from vocseg.build import Job, build
from vocseg.data.loader import TrainingBatches
from vocseg.device import Placement
from vocseg.evaluate.validation import evaluate
from vocseg.network import raw_outputs, set_training
from vocseg.recipe.prepare import load_recipe
from vocseg.runs.checkpoint import state_saver
from vocseg.train.feed import on_device
from vocseg.train.loop import train

RECIPE = """
[model]
name = "smp"
decoder = "{decoder}"
encoder = "{encoder}"

[data]
name = "voc"
year = 2007
batch_size = {batch}
repeat = {repeat}
normalize = "imagenet"
cache = "off"
workers = {workers}

[[augmentation]]
name = "random_scale"

[[augmentation]]
name = "crop"
size = {size}

[[augmentation]]
name = "horizontal_flip"

[[augmentation]]
name = "color_jitter"

[optimizer]
name = "adamw"

[schedule]
name = "poly"

[train]
epochs = 1
precision = "{precision}"
"""
WINDOW = 20  # steps between which one state is saved, or none


@dataclass(frozen=True)
class Network:
    decoder: str
    encoder: str
    batch: int


NETWORKS = {"unet": Network("Unet", "resnet34", 32), "deeplab": Network("DeepLabV3Plus", "resnet101", 16)}
TINY = {"unet": Network("Unet", "resnet18", 2), "deeplab": Network("DeepLabV3Plus", "resnet18", 2)}


@dataclass
class Clock:
    """Seconds a step, from the step `warm` to the step `end`; at both the device is waited for.

    Attributes:
        peak: bytes allocated on the device at most, in between.
        busy: share of that time in which the device ran something, if `profiled`.
    """

    device: torch.device
    warm: int
    end: int
    profiled: bool = False
    seconds: float = math.nan
    peak: int = 0
    busy: float = math.nan
    _begun: float = 0.0
    _profile: Any = None

    def step(self, number: int) -> None:
        """Is told that so many steps have been asked for."""
        if number == self.warm:
            wait(self.device)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            if self.profiled:
                activity = torch.profiler.ProfilerActivity
                kind = activity.CUDA if self.device.type == "cuda" else activity.CPU
                self._profile = torch.profiler.profile(activities=[kind])
                self._profile.start()
            self._begun = time.perf_counter()
        if number == self.end:
            wait(self.device)
            self.seconds = (time.perf_counter() - self._begun) / (self.end - self.warm)
            if self.device.type == "cuda":
                self.peak = torch.cuda.max_memory_allocated(self.device)
            if self._profile is not None:
                self._profile.stop()
                self.busy = busy_share(self._profile.events(), self.device)


def busy_share(events: Any, device: torch.device) -> float:
    """The share of the time from the first to the last in which the device ran a kernel or copied."""
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    found = [e for e in events if e.device_type == kind and not getattr(e, "is_user_annotation", False)]
    spans = sorted((e.time_range.start, e.time_range.end) for e in found if not e.name.startswith("Optimizer."))
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / (reached - spans[0][0])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Bench:
    """One network, and all that its measurements share."""

    network: Network
    size: int
    device: torch.device
    warm: int
    steps: int
    workers: int
    folder: Path
    data: Path
    images: int
    clocks: dict[str, list[Clock]] = field(default_factory=dict)

    @property
    def end(self) -> int:
        return self.warm + self.steps

    def job(self, *overrides: str, precision: str = "auto") -> Job:
        """All of it built anew, from the same seed."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        path = self.folder / "gpu.toml"
        path.write_text(
            RECIPE.format(
                decoder=self.network.decoder,
                encoder=self.network.encoder,
                batch=self.network.batch,
                size=self.size,
                workers=self.workers,
                precision=precision,
                repeat=math.ceil((self.end + 8) * self.network.batch / self.images),
            )
        )
        return build(load_recipe(str(path), overrides=overrides, data=self.data)[0], str(self.device))

    def clock(self, name: str, profiled: bool = False, steps: int | None = None) -> Clock:
        print(f"{time.strftime('%X')}  {self.network.decoder}: {name}", file=sys.__stderr__, flush=True)
        clock = Clock(self.device, self.warm, self.warm + (steps or self.steps), profiled)
        self.clocks.setdefault(name, []).append(clock)
        return clock

    def milliseconds(self, name: str) -> float:
        return 1000 * statistics.median(clock.seconds for clock in self.clocks[name])


@dataclass
class Repeated:
    """One batch over and over, in the loader's place."""

    batch: Any
    steps: int

    def __len__(self) -> int:
        return self.steps

    def epochs(self, first: int, stop: int, **more: Any) -> Iterator[Any]:
        for _ in range(self.steps):
            yield self.batch


def one_batch(job: Job) -> Any:
    with contextlib.closing(job.training.batches.epoch(0)) as batches:
        return next(batches)


def never(network: nn.Module) -> Any:
    raise AssertionError("the epoch was not to end")


# The sides. Each trains `clock.end` steps.


def bare_loop(job: Job, clock: Clock, losses: list[Tensor] | None = None, kernels_tried: bool = True) -> None:
    t = job.training
    set_training(t.network, t.backbone, frozen=False)
    pixels, labels = (tensor.to(clock.device) for tensor in one_batch(job))
    for number in range(clock.end):
        clock.step(number)
        for group, base in zip(t.optimizer.param_groups, t.base_lrs, strict=True):
            group["lr"] = base * t.schedule(number)
        if losses is not None:  # dropout then draws what it draws in vocseg
            t.placement.seed((t.seed << 31) + number)
        images = t.placement.lay_out(t.normalization(pixels))
        with t.placement.kernels_tried(kernels_tried):
            with t.placement.autocast():
                logits = t.network(images)
            loss = t.loss(logits.float(), labels.long())
            loss.backward()
        t.optimizer.step()
        t.optimizer.zero_grad(set_to_none=True)
        if losses is not None:
            losses.append(loss.detach())
    clock.step(clock.end)


def vocseg(job: Job, clock: Clock, losses: list[Tensor] | None = None, repeated: bool = False) -> None:
    """vocseg's loop, from files or on one batch that is sent to the device at every step."""
    if repeated:
        job.training.batches = Repeated(one_batch(job), clock.end + 1)  # type: ignore[assignment]
    with contextlib.closing(train(job.training, never)) as events:
        for number in range(clock.end):
            clock.step(number)
            event = next(events)
            if losses is not None:
                losses.append(event.loss)
        clock.step(clock.end)


# Other runners: what a user writes who follows their documentation. Each builder returns f(bench, clock, bf16).


class Normalized(nn.Module):
    """The network with what vocseg does to pixels before it: for those who have no such step."""

    def __init__(self, job: Job):
        super().__init__()
        self.network, self.normalize = job.network.module, job.training.normalization

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network(self.normalize(pixels).contiguous())


class WithLoss(Normalized):
    """As above, giving the loss."""

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"loss": cross_entropy(super().forward(pixels), labels)}


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels.long(), ignore_index=255)


class Samples(torch.utils.data.Dataset):
    """vocseg's own samples, for a DataLoader."""

    def __init__(self, batches: TrainingBatches, count: int):
        self.batches, self.count = batches, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        image, mask = self.batches.sample(0, position)
        return torch.from_numpy(image), torch.from_numpy(mask)


class Timed(IterableDataset):
    """Batches of a DataLoader that tell a clock when they are asked for."""

    def __init__(self, bench: Bench, job: Job, clock: Clock, form: Callable[[list[Tensor]], Any] = tuple):
        batch, cuda = bench.network.batch, clock.device.type == "cuda"
        samples = Samples(job.training.batches, (clock.end + 2) * batch)
        forked = (
            {"multiprocessing_context": "fork"} if bench.workers else {}
        )  # samples are closures, which do not pickle
        self.loader = DataLoader(
            samples, batch, shuffle=True, num_workers=bench.workers, pin_memory=cuda, drop_last=True, **forked
        )
        self.clock, self.form = clock, form

    def __len__(self) -> int:
        return self.clock.end + 1  # with the one at which the clock stops

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(itertools.islice(self.loader, len(self))):
            self.clock.step(number)
            yield self.form(batch)


def plain_job(bench: Bench) -> tuple[Job, torch.optim.Optimizer]:
    """The network in fp32 and torch's own memory layout, and AdamW as torch makes it."""
    job = bench.job("train.channels_last=false", precision="fp32")
    job.network.module.train()
    return job, torch.optim.AdamW(job.network.module.parameters(), lr=1e-3)


def scheduler_of(job: Job, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, job.training.schedule)


Runner = Callable[[Bench, Clock, bool], None]


def lightning() -> Runner:
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self, job: Job, optimizer: torch.optim.Optimizer):
            super().__init__()
            self.network, self.parts = Normalized(job), (optimizer, scheduler_of(job, optimizer))

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = cross_entropy(self.network(batch[0]), batch[1])
            self.log("train_loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer, scheduler = self.parts
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train(bench: Bench, clock: Clock, bf16: bool) -> None:
        job, optimizer = plain_job(bench)
        lightning.Trainer(
            max_epochs=1,
            accelerator="gpu" if clock.device.type == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if bf16 else None,
            default_root_dir=bench.folder,
            enable_model_summary=False,
        ).fit(Module(job, optimizer), Timed(bench, job, clock))

    return train


def accelerate() -> Runner:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from tqdm import tqdm

    def train(bench: Bench, clock: Clock, bf16: bool) -> None:
        job, optimizer = plain_job(bench)
        AcceleratorState._reset_state(reset_partial_state=True)  # which is one for a whole process
        accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=clock.device.type == "cpu")
        network, optimizer, loader, scheduler = accelerator.prepare(
            Normalized(job), optimizer, DataLoader(Timed(bench, job, clock), None), scheduler_of(job, optimizer)
        )
        total = torch.zeros((), device=accelerator.device)
        for pixels, labels in tqdm(loader):
            loss = cross_entropy(network(pixels), labels)
            total += loss.detach().float()
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    return train


def hugging_face_trainer() -> Runner:
    import transformers
    from accelerate.state import AcceleratorState

    class Trainer(transformers.Trainer):
        batches: Timed

        def get_train_dataloader(self) -> Any:
            return self.batches

    def train(bench: Bench, clock: Clock, bf16: bool) -> None:
        job, optimizer = plain_job(bench)
        AcceleratorState._reset_state(reset_partial_state=True)
        settings = transformers.TrainingArguments(
            str(bench.folder / "hugging-face"),
            num_train_epochs=1,
            max_grad_norm=0.0,  # the others do not clip
            bf16=bf16,
            use_cpu=clock.device.type == "cpu",
            report_to="none",
        )
        trainer = Trainer(WithLoss(job), settings, optimizers=(optimizer, scheduler_of(job, optimizer)))
        trainer.batches = Timed(bench, job, clock, form=lambda batch: {"pixels": batch[0], "labels": batch[1]})
        trainer.train()

    return train


def mmengine() -> Runner:
    from mmengine.model import BaseModel
    from mmengine.optim import AmpOptimWrapper, OptimWrapper
    from mmengine.optim.scheduler import PolyLR
    from mmengine.runner import Runner as Engine

    class Model(BaseModel):
        def __init__(self, job: Job):
            super().__init__()
            self.network = WithLoss(job)

        def forward(self, pixels: Tensor, labels: Tensor, mode: str = "loss") -> dict[str, Tensor]:
            return self.network(pixels, labels)

    def train(bench: Bench, clock: Clock, bf16: bool) -> None:
        job, optimizer = plain_job(bench)
        Engine(
            Model(job),
            work_dir=str(bench.folder / "mmengine"),
            train_dataloader=DataLoader(Timed(bench, job, clock), None),
            train_cfg={"by_epoch": False, "max_iters": clock.end + 1, "val_interval": 10**9},
            optim_wrapper=AmpOptimWrapper(dtype="bfloat16", optimizer=optimizer) if bf16 else OptimWrapper(optimizer),
            param_scheduler=PolyLR(optimizer, power=0.9, begin=0, end=clock.end, by_epoch=False),
            default_hooks={"logger": {"type": "LoggerHook", "interval": 50}, "sampler_seed": None},
            experiment_name=f"gpu-{time.time_ns()}",
        ).train()

    return train


PEERS = {
    "Lightning": lightning,
    "accelerate": accelerate,
    "Hugging Face Trainer": hugging_face_trainer,
    "mmengine": mmengine,
}


# The measurements, each a row of what is reported.


def conditions(bench: Bench) -> dict[str, bool]:
    return {
        "no step makes the host wait": steps_never_wait(bench),
        "no scored image makes the host wait": scoring_never_waits(bench),
        "losses are the bare loop's": losses_agree(bench),
        "images augmented on the device are the CPU's": renderings_agree(bench),
    }


@contextlib.contextmanager
def waiting_is_an_error(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def steps_never_wait(bench: Bench) -> bool:
    for augment_on in ("cpu", "device"):
        with contextlib.closing(train(bench.job(f'data.augment_on="{augment_on}"').training, never)) as events:
            next(events)  # what is done once, such as trying kernels, may
            try:
                with waiting_is_an_error(bench.device):
                    next(events)
                    next(events)
            except RuntimeError as error:
                print(f"augment_on {augment_on}: {error}", file=sys.stderr)
                return False
    return True


def scoring_never_waits(bench: Bench) -> bool:
    job = bench.job()
    events = evaluate(job.predictor(job.network.module), job.val, job.loss)
    next(events)
    try:
        with waiting_is_an_error(bench.device):
            next(events)
    except RuntimeError as error:
        print(f"scoring: {error}", file=sys.stderr)
        return False
    return True


def losses_agree(bench: Bench) -> bool:
    values = []
    for side in (bare_loop, vocseg):
        losses: list[Tensor] = []
        more = {"repeated": True} if side is vocseg else {}
        job = bench.job(precision="fp32")
        side(job, Clock(bench.device, 0, 3), losses, **more)  # type: ignore[arg-type]
        values.append([loss.item() for loss in losses])
    bare, ours = values
    if bench.device.type == "cpu":
        return bare == ours
    return all(abs(a - b) <= 0.05 * abs(a) for a, b in zip(bare, ours, strict=True))


def renderings_agree(bench: Bench) -> bool:
    batches = []
    for where, device in (("cpu", torch.device("cpu")), ("device", bench.device)):
        sent = on_device(iter([one_batch(bench.job(f'data.augment_on="{where}"'))]), Placement(device, "fp32"))
        batches.append([tensor.cpu() for tensor in next(sent)])
    (images, labels), (rendered, rendered_labels) = batches
    near = ((images.int() - rendered.int()).abs() <= 2).float().mean()
    return bool(near > 0.99) and torch.equal(labels, rendered_labels)


def throughput(bench: Bench, rounds: int) -> dict[str, Any]:
    """vocseg from files, on the CPU and on the device, beside the bare loop."""
    cpu, device = 'data.augment_on="cpu"', 'data.augment_on="device"'
    sides: dict[str, Callable[[str], None]] = {
        "bare loop": lambda name: bare_loop(bench.job(), bench.clock(name)),
        "vocseg, files": lambda name: vocseg(bench.job(cpu), bench.clock(name)),
        "vocseg, files, augmented on the device": lambda name: vocseg(bench.job(device), bench.clock(name)),
        "vocseg, one batch": lambda name: vocseg(bench.job(), bench.clock(name), repeated=True),
        "bare loop, kernels not tried": lambda name: bare_loop(bench.job(), bench.clock(name), kernels_tried=False),
    }
    for _ in range(rounds):
        for name, train_on in sides.items():
            train_on(name)
    compiled = "vocseg, one batch, compiled"
    vocseg(bench.job("train.compile=true"), bench.clock(compiled), repeated=True)
    profiled = bench.clock("profiled", profiled=True)
    vocseg(bench.job(cpu), profiled)
    bare = bench.milliseconds("bare loop")
    names = [*sides, compiled]
    found = {
        "step_ms": {name: round(bench.milliseconds(name), 2) for name in names},
        "images_per_second": {name: round(1000 * bench.network.batch / bench.milliseconds(name), 1) for name in names},
        "share_of_the_bare_loops_speed": {name: round(bare / bench.milliseconds(name), 3) for name in names},
        "busy_share": round(profiled.busy, 4),
    }
    if bench.device.type == "cuda":
        least = max(bench.clocks["bare loop"][0].peak, 1)
        found["peak_memory_of_the_bare_loops"] = {name: round(bench.clocks[name][0].peak / least, 3) for name in names}
        found["bare_loop_peak_bytes"] = least
    return found


def checkpoints(bench: Bench, windows: int) -> dict[str, float]:
    """What saving one state costs the steps around it, in milliseconds; the writing is waited for between windows."""
    job = bench.job()
    job.training.batches = Repeated(one_batch(job), 10**6)  # type: ignore[assignment]
    board = run._scoreboard(job.recipe)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    calls = []
    with state_saver(bench.folder) as saver, contextlib.closing(train(job.training, never)) as events:
        for number in range(2 * (windows + 1)):
            saving = number % 2 == 1
            wait(bench.device)
            begun = time.perf_counter()
            for step in range(WINDOW):
                next(events)
                if saving and step == WINDOW // 2:
                    called = time.perf_counter()
                    run._save(job, board, saver, {})
                    calls.append(time.perf_counter() - called)
            wait(bench.device)
            if number >= 2:  # the first pair pays for pinned memory, once a run
                seconds[saving].append(time.perf_counter() - begun)
            saver.wait()
    plain, saved = (1000 * statistics.median(seconds[saving]) for saving in (False, True))
    return {"cost_ms": round(saved - plain, 2), "host_ms": round(1000 * statistics.median(calls[1:]), 2)}


def validation(bench: Bench, rounds: int) -> dict[str, float]:
    """A validation pass beside nothing but its forward passes, both from memory."""
    job = bench.job()
    pairs = [job.val.read(index) for index in range(len(job.val))]
    val = replace(job.val, read=pairs.__getitem__)
    predictor = job.predictor(job.network.module)
    seen = []

    def score() -> None:
        for _ in evaluate(predictor, val, job.loss):
            pass

    def forward() -> None:
        with torch.inference_mode():
            for images in seen:
                with predictor.placement.autocast():
                    raw_outputs(predictor.network, images, predictor.stride)["out"].full()

    score()
    for index in range(len(val)):
        pixels = predictor.placement.send(torch.tensor(val.read(index)[0])[None])
        seen.append(predictor.placement.lay_out(predictor.normalization(pixels)))
    times: dict[str, list[float]] = {"pass": [], "forwards": []}
    for number in range(rounds + 1):
        for name, side in (("pass", score), ("forwards", forward)):
            wait(bench.device)
            begun = time.perf_counter()
            side()
            wait(bench.device)
            if number:
                times[name].append(time.perf_counter() - begun)
    took = {name: statistics.median(values) for name, values in times.items()}
    return {
        "images_per_second": round(len(val) / took["pass"], 1),
        "pass_over_forwards": round(took["pass"] / took["forwards"], 3),
    }


def others(bench: Bench, runners: dict[str, Runner]) -> dict[str, Any]:
    """How many times as long as vocseg's, from files, a step of each other runner takes."""
    ours = bench.milliseconds("vocseg, files")
    found: dict[str, Any] = {}
    for name, runner in runners.items():
        for bf16 in (False, True):
            row = f"{name}, at equal precision" if bf16 else name
            clock = bench.clock(row, steps=max(bench.steps // 4, 1))
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    runner(bench, clock, bf16)
                found[row] = round(1000 * clock.seconds / ours, 2) if clock.seconds > 0 else "did not train to the end"
            except Exception as error:  # one that runs out of memory, say, is no reason to lose the rest
                found[row] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found


def main() -> None:
    asked = arguments(
        __doc__, rounds=3, steps=200, device="cuda", network="all", quick=False, no_peers=False, data=None
    )
    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        report(skipped="no CUDA device")
        return
    warnings.simplefilter("ignore")
    device = torch.device(asked.device)
    quick = asked.quick
    steps, rounds, warm, size, images = (2, 1, 1, 64, 6) if quick else (asked.steps, asked.rounds, 20, 512, 256)
    networks = TINY if quick else NETWORKS
    chosen = networks if asked.network == "all" else {asked.network: networks[asked.network]}
    runners, missing = ({}, {}) if asked.no_peers else peers(PEERS)
    figures: dict[str, Any] = {}
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        data = asked.data or draw_voc(Path(folder) / "data", images)
        workers = 0 if quick else len(os.sched_getaffinity(0))
        for name, network in chosen.items():
            out = Path(folder) / name
            out.mkdir()
            bench = Bench(network, size, device, warm, steps, workers, out, data, images)
            held = conditions(bench)
            failed += [f"{name}: {condition}" for condition, holds in held.items() if not holds]
            figures[name] = {"conditions": held, "precision": bench.job().placement.precision}
            figures[name] |= throughput(bench, rounds)
            figures[name]["checkpoint"] = checkpoints(bench, windows=1 if quick else 5)
            figures[name]["validation"] = validation(bench, rounds)
            figures[name]["step_of_others_over_ours"] = others(bench, runners)
            print(f"{name}: {figures[name]}", file=sys.stderr)  # should what follows fail
    machine: dict[str, Any] = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}
    report(
        environment=environment("lightning", "accelerate", "transformers", "mmengine")
        | machine
        | {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()},
        quick=quick,
        steps=steps,
        rounds=rounds,
        size=size,
        batches={name: network.batch for name, network in chosen.items()},
        **figures,
        missing=missing,
    )
    if failed:
        sys.exit("; ".join(failed))


if __name__ == "__main__":
    main()
