"""What a run says while it goes: a live display on a terminal, plain lines elsewhere, JSON lines, or nothing."""

import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from typing import Any

import click
import torch

from vocseg.cli.output import print_json, print_line
from vocseg.errors import visible
from vocseg.evaluate.validation import Scored
from vocseg.run import Event, Finished, Started
from vocseg.runs.files import without_nan
from vocseg.train.loop import Epoch, Step

LINE_SECONDS = 10.0  # between two plain lines within an epoch


def choose(*, quiet: bool, as_json: bool) -> "Quiet | Json | Plain | Live":
    if os.environ.get("RANK", "0") != "0":  # of torchrun's processes the first speaks
        return Quiet()
    if as_json:
        return Json()
    if quiet:
        return Quiet()
    return Live() if sys.stderr.isatty() and sys.stdout.isatty() else Plain()


class Quiet:
    """The run's path, at the end."""

    def follow(self, events: Iterator[Event]) -> None:
        for event in events:
            if isinstance(event, Finished):
                print_line(str(event.run))


class Json:
    """One JSON object a line: the start, every epoch, and last the run with its figures."""

    def follow(self, events: Iterator[Event]) -> None:
        for event in events:
            if isinstance(event, Started):
                self._print({"event": "started", **asdict(event), "run": str(event.run)})
            elif isinstance(event, Epoch):
                self._print({"event": "epoch", **asdict(event)})
            elif isinstance(event, Finished):
                self._print({"event": "finished", "run": str(event.run), **event.result})

    def _print(self, value: dict[str, Any]) -> None:
        print_json(without_nan(value), indent=None)
        sys.stdout.flush()


class Plain:
    """A line an epoch, and one every ten seconds within long epochs."""

    def follow(self, events: Iterator[Event]) -> None:
        started: Started | None = None
        spoke = time.monotonic()
        pace, loss = _Pace(), _Loss()
        for event in events:
            if isinstance(event, Started):
                started, pace = event, _Pace()  # what building took is behind
                for line in describe(event):
                    print_line(line)
            elif isinstance(event, Step):
                assert started is not None
                pace.step(event)
                if time.monotonic() - spoke > LINE_SECONDS:
                    spoke = time.monotonic()
                    click.echo(
                        f"epoch {event.epoch + 1}/{started.epochs}  step {event.step}/{started.steps_per_epoch}  "
                        f"loss {loss.read(event):.4f}  lr {event.lr:.2g}  {pace.images_per_second:.1f} img/s  "
                        f"{pace.left(started, event)} left"
                    )
            elif isinstance(event, Scored):
                if time.monotonic() - spoke > LINE_SECONDS:
                    spoke = time.monotonic()
                    click.echo(f"validation  {event.done}/{event.total} images")
            elif isinstance(event, Epoch):
                assert started is not None
                spoke = time.monotonic()
                click.echo(describe_epoch(event, started))
            else:
                print_result(event)
            sys.stdout.flush()


class Live:
    """Progress bars, with a line left behind for every epoch."""

    def follow(self, events: Iterator[Event]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        console = Console()
        columns = (TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.fields[note]}"))
        started: Started | None = None
        pace, loss = _Pace(), _Loss()
        finished: Finished | None = None
        console.print("[dim]building …[/]", end="\r")
        with Progress(*columns, console=console, transient=True, refresh_per_second=5) as progress:
            bar = progress.add_task("building", total=None, note="")
            spoke = 0.0
            for event in events:
                if isinstance(event, Started):
                    started, pace = event, _Pace()  # what building took is behind
                    for line in describe(event):
                        console.print(visible(line), highlight=False, markup=False, emoji=False)
                    progress.update(bar, description="training", total=event.steps_per_epoch)
                elif isinstance(event, Step):
                    assert started is not None
                    pace.step(event)
                    if time.monotonic() - spoke > 0.25:  # for drawing takes time
                        spoke = time.monotonic()
                        progress.update(
                            bar,
                            description=f"epoch {event.epoch + 1}/{started.epochs}",
                            total=started.steps_per_epoch,
                            completed=event.step,
                            note=f"{event.step}/{started.steps_per_epoch}  loss {loss.read(event):.3f}  "
                            f"lr {event.lr:.1e}  {pace.images_per_second:.0f} img/s  {pace.left(started, event)} left",
                        )
                elif isinstance(event, Scored):
                    note = f"{event.done}/{event.total}"
                    progress.update(bar, description="validation", total=event.total, completed=event.done, note=note)
                elif isinstance(event, Epoch):
                    assert started is not None
                    console.print(describe_epoch(event, started, console.width), highlight=False, markup=False)
                    progress.update(bar, description="saving", total=None, note="")  # and, in the end, drawing
                else:
                    finished = event
        if finished is not None:
            print_result(finished)


class _Pace:
    """How fast training goes, over the last steps."""

    def __init__(self) -> None:
        self.marks: deque[tuple[float, int]] = deque(maxlen=31)
        self.begun = time.monotonic()
        self.steps = 0

    def step(self, event: Step) -> None:
        self.steps += 1
        self.marks.append((time.monotonic(), event.images))

    @property
    def images_per_second(self) -> float:
        if len(self.marks) < 2:
            return 0.0
        seconds = self.marks[-1][0] - self.marks[0][0]
        return sum(images for _, images in islice(self.marks, 1, None)) / max(seconds, 1e-9)

    def left(self, started: Started, event: Step) -> str:
        """Time to the last epoch at the pace so far, validation included."""
        to_do = (started.epochs - event.epoch) * started.steps_per_epoch - event.step
        return duration((time.monotonic() - self.begun) / self.steps * to_do)


class _Loss:
    """Reads losses off a device without making it run out of work.

    To read the loss of the step that CUDA has just been asked for is to wait for it, and then CUDA has nothing to do
    until the host asks for the next. So what is read is the loss of the step at which one was last asked for, which
    lies in the host's memory by now.
    """

    def __init__(self) -> None:
        self.before: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def read(self, event: Step) -> float:
        if not event.loss.is_cuda:
            return float(event.loss)
        sent = event.loss.to("cpu", non_blocking=True)  # into pinned memory
        now = sent, torch.cuda.current_stream(event.loss.device).record_event()
        (loss, arrived), self.before = self.before or now, now
        arrived.synchronize()
        return float(loss)


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def describe(event: Started) -> list[str]:
    lines = [
        f"{event.recipe}: {event.parameters:,} parameters on {event.device}; {event.train_images:,} training and "
        f"{event.val_images:,} validation images, {event.classes} classes; "
        f"{event.epochs} epoch{'' if event.epochs == 1 else 's'} of "
        f"{event.steps_per_epoch:,} steps",
        f"run folder {event.run}",
    ]
    if event.first_epoch or event.first_step:
        epoch = min(event.first_epoch + 1, event.epochs)
        lines.append(f"resumed in epoch {epoch}, after step {event.first_step}")
    return [*lines, *event.notes]


def describe_epoch(event: Epoch, started: Started, room: int | None = None) -> str:
    """The figures of an epoch; the last of them are left out where a terminal has no `room` for them."""
    width = len(str(started.epochs))
    fields = [f"epoch {event.epoch:>{width}}/{started.epochs}", f"train loss {event.train_loss:.4f}"]
    if event.miou is not None and event.val_loss is not None and event.pixel_accuracy is not None:
        fields += [f"val loss {event.val_loss:.4f}", f"mIoU {event.miou:.4f}"]
        fields += [f"pixel accuracy {event.pixel_accuracy:.4f}"]
    fields += [f"lr {event.lr:.2g}", f"{event.images_per_second:.1f} img/s", duration(event.seconds)]
    while room is not None and len("  ".join(fields)) > room and len(fields) > 2:
        fields.pop()
    return "  ".join(fields)


def print_result(event: Finished) -> None:
    print_figures(event.result)
    minutes, best = event.result["minutes"], event.result["best_epoch"]
    click.echo(f"weights of epoch {best} of {event.result['epochs']}, {minutes:.1f} minutes")
    for note in event.notes:
        print_line(note)
    print_line(str(event.run))


def print_figures(result: dict[str, Any]) -> None:
    """The scores of a set beside its null models, and the IoU of every class."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 100
    low, high = result["miou_interval"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"{visible(result['split'])}, {result['images']} images")
    table.add_column("mIoU", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("pixel accuracy", justify="right")
    row = (f"{result['miou']:.4f}", f"{low:.4f} to {high:.4f}", f"{result['pixel_accuracy']:.4f}")
    table.add_row(visible(result["recipe"]), *row, style="bold")
    nulls = result["null_models"]
    for name, null in nulls.items():
        if null is not nulls["all background"] and null == nulls["all background"]:
            continue  # background is the best constant, as it mostly is
        table.add_row(name, f"{null['miou']:.4f}", "", f"{null['pixel_accuracy']:.4f}")
    console.print()
    console.print(table)
    iou = [f"{visible(name)} {'absent' if value != value else f'{value:.2f}'}" for name, value in result["iou"].items()]
    if len(iou) <= 40:
        console.print()
        console.print("IoU  " + "  ".join(iou), soft_wrap=False)
    console.print()
