"""The composition root: a recipe becomes objects, the loop runs, and a run folder tells what came of it."""

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vocseg.build import Job, build
from vocseg.device import choose_device, peak_memory_bytes
from vocseg.distributed import World, join, launched, restarted
from vocseg.errors import EnvironmentFault, Interrupted, Problem, TrainingError, UsageError, VocsegError
from vocseg.evaluate.figures import figures
from vocseg.evaluate.validation import Evaluation, Scored, evaluate
from vocseg.network import count_parameters
from vocseg.plugins import discover
from vocseg.recipe.reader import Recipe, read_recipe
from vocseg.report.run import write_pictures
from vocseg.runs.checkpoint import StateSaver, load_state, load_tensors, save_tensors, state_saver
from vocseg.runs.files import write_json
from vocseg.runs.folder import RunFolder
from vocseg.train.early_stopping import Best, better_is_less
from vocseg.train.loop import Epoch, Step, train
from vocseg.train.signals import StopRequest, stop_request


@dataclass(frozen=True)
class Started:
    """Everything is built; training begins."""

    run: Path
    recipe: str
    device: str
    parameters: int
    train_images: int
    val_images: int
    classes: int
    epochs: int
    steps_per_epoch: int
    first_epoch: int
    first_step: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The run folder is complete."""

    run: Path
    result: dict[str, Any]


Event = Started | Step | Scored | Epoch | Finished


def start(recipe: Recipe, *, out: Path = Path("runs"), device: str = "auto") -> Iterator[Event]:
    """Runs a recipe into a new run folder.

    Under `torchrun` every process calls this, and all of them train together; only the first writes the folder. When
    `torchrun` has started them anew because one failed, they go on with the folder they had.

    Raises:
        VocsegError: before the folder is made, if anything cannot be built; `Interrupted` on a signal.
    """
    with join(choose_device(device)) as world:
        before = _before_restart(world, out / recipe.name)
        if before is not None:
            yield from _resume(before, device, world)
            return
        job = build(recipe, device, world=world)
        recipe = job.recipe  # with the batch size that was found, where it was to be
        folder = RunFolder(out)
        if world.first:
            folder = RunFolder.create(out, recipe)
            folder.write_environment(recipe, job.placement.describe(), world.size, launched())
            folder.write_classes(job.train.classes, job.train.palette)
        folder = RunFolder(Path(world.text_of_first(str(folder.path))))
        filled = job.network.filled
        yield from _execute(job, folder, _Scoreboard(recipe), ((f"weights: {filled}",) if filled else ()) + job.notes)


def resume(path: Path, *, device: str = "auto") -> Iterator[Event]:
    """Goes on with a run from its last state, to the weights it would have had without the interruption.

    Under `torchrun` by any number of processes, whatever the number before; all of them read the run folder.

    Raises:
        UsageError: the path is no run folder, or the run has ended.
        EnvironmentFault: there is no whole state.
    """
    folder = RunFolder.open(path)
    if folder.result.is_file():
        raise UsageError(Problem(str(path), f"this run has ended; its figures are in {folder.result}"))
    with join(choose_device(device)) as world:
        yield from _resume(folder, device, world)


def _resume(folder: RunFolder, device: str, world: World) -> Iterator[Event]:
    recipe = run_recipe(folder)
    state, problems = load_state(folder.path)
    done = float(state["training"]["epoch"]), float(state["training"]["step"])
    if world.largest(*done) != [*done]:
        raise EnvironmentFault(Problem(str(folder.path), "the processes read different states of this run; try again"))
    job = build(recipe, device, pretrained=False, precision=folder.precision, world=world)
    job.training.load(state["training"])
    board = _Scoreboard(recipe)
    board.load(state["scoreboard"])
    yield from _execute(job, folder, board, tuple(f"{problem}; going on from the state before" for problem in problems))


def _before_restart(world: World, runs: Path) -> RunFolder | None:
    """The unfinished folder of the processes that these take the place of, if they got as far as to save a state."""
    found = ""
    if world.first and restarted():
        folders = [RunFolder(path.parent) for path in runs.glob("*/state.json")]
        found = next((str(f.path) for f in folders if f.launched == launched() and not f.result.is_file()), "")
    path = world.text_of_first(found)
    return RunFolder(Path(path)) if path else None


def run_recipe(folder: RunFolder, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of an existing run, with the plugins that were copied into it."""
    registry = discover(plugins=folder.plugins if folder.plugins.is_dir() else None)
    return replace(read_recipe(folder.resolved, registry, overrides), name=folder.recipe_name)


class _Scoreboard:
    """Which epoch's weights to keep, and whether to stop early."""

    def __init__(self, recipe: Recipe):
        self.keep = recipe.evaluate.metric
        self.best = Best(better_is_less(self.keep))
        self.rule = recipe.early_stopping
        self.stopper = Best(better_is_less(self.rule.metric, self.rule.mode)) if self.rule else None
        self.stopped = False
        self.trained = False

    def update(self, epoch: Epoch) -> bool:
        """Takes an epoch's figures, and says whether its weights are the ones to keep so far."""
        if self.rule and self.stopper:
            value = epoch.metric(self.rule.metric)
            if value is not None:
                self.stopper.update(value, epoch.epoch)
                # Only validated weights can be kept: with evaluate.every above 1 the next validation is waited for.
                self.stopped = self.stopper.waited >= self.rule.patience and epoch.miou is not None
        if epoch.miou is None:
            return False
        if self.keep == "last":
            self.best.value, self.best.epoch = epoch.miou, epoch.epoch
            return True
        value = epoch.metric(self.keep)
        assert value is not None  # a validated epoch has every figure
        return self.best.update(value, epoch.epoch)

    def state(self) -> dict[str, Any]:
        return {"best": self.best.state(), "stopper": self.stopper and self.stopper.state(), "stopped": self.stopped}

    def load(self, state: dict[str, Any]) -> None:
        self.best.load(state["best"])
        if self.stopper is not None:
            self.stopper.load(state["stopper"])
        self.stopped = state["stopped"]


def _execute(job: Job, folder: RunFolder, board: _Scoreboard, notes: tuple[str, ...] = ()) -> Iterator[Event]:
    training, recipe = job.training, job.recipe
    world = training.world
    yield Started(
        run=folder.path,
        recipe=recipe.name,
        device=job.placement.describe() + (f", {world.size} processes" if world.size > 1 else ""),
        parameters=count_parameters(training.network),
        train_images=len(job.train),
        val_images=len(job.val),
        classes=len(job.train.classes),
        epochs=training.epochs,
        steps_per_epoch=training.steps_per_epoch,
        first_epoch=training.epoch,
        first_step=training.step,
        notes=notes,
    )

    with stop_request() as stop:
        try:
            with state_saver(folder.path) as saver:
                yield from _save_when_due(_train_and_score(job, folder, board, saver), job, folder, board, saver, stop)
        except TrainingError as error:
            raise TrainingError(*error.problems, Problem(str(folder.path), "what was saved before is kept")) from error
        except VocsegError:
            raise
        except OSError as error:
            raise EnvironmentFault(Problem(str(folder.path), f"{error.strerror or error}; free space?")) from error
        except Exception as error:  # out of memory, or something inside a plugin
            raise TrainingError(
                _explain(error, job), Problem(str(folder.path), "what was saved before is kept")
            ) from error


def _save_when_due(
    events: Iterator[Event], job: Job, folder: RunFolder, board: _Scoreboard, saver: StateSaver, stop: StopRequest
) -> Iterator[Event]:
    """Passes events on, saving the state now and then, and all of it before stopping on a signal."""
    training = job.training
    saved = time.monotonic()
    for event in events:
        yield event
        if isinstance(event, Finished):
            return
        # Kept weights and the state that knows of them belong together.
        kept = isinstance(event, Epoch) and board.best.epoch == event.epoch
        due = kept or time.monotonic() - saved >= job.recipe.train.checkpoint_minutes * 60
        # A signal may come to one process, or to all between different steps: they save and stop together.
        save_now, signal_number = map(int, training.world.largest(due, stop.signal_number))
        if not board.trained and (save_now or signal_number):
            _save(job, board, saver)
            saved = time.monotonic()
        if signal_number:
            saver.wait()
            raise Interrupted(
                f"stopped in epoch {min(training.epoch + 1, training.epochs)} of {training.epochs}, all saved; "
                f"go on with: vocseg run --resume {folder.path}",
                signal_number,
            )


def _explain(error: Exception, job: Job) -> str:
    text = " ".join(str(error).split())[:300]
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in text or "can't allocate" in text:
        text += "; lower data.batch_size (and raise train.accumulate to keep its effect), the crop, evaluate.scales "
        text += "or evaluate.window"
    else:
        text += f"; `vocseg check {job.recipe.name}` tries one batch, and --debug shows where it happened"
    epoch = min(job.training.epoch + 1, job.training.epochs)
    return f"epoch {epoch}: {type(error).__name__}: {text}"


def _train_and_score(job: Job, folder: RunFolder, board: _Scoreboard, saver: StateSaver) -> Iterator[Event]:
    """Trains to the end, keeping the weights to be kept, then scores those and writes what is to be read."""
    training, world = job.training, job.training.world
    latest: Evaluation | None = None

    def validate(module: nn.Module) -> Generator[Scored, None, Evaluation]:
        nonlocal latest
        world.follow_first(module.buffers())  # batch norms have seen each process's own share of the last batch
        latest = yield from evaluate(job.predictor(module), job.val, job.loss, world)
        return latest

    kept: Evaluation | None = None
    if not board.stopped:
        for event in train(training, validate):
            if isinstance(event, Epoch):
                if world.first:
                    folder.append_metrics(asdict(event))
                if board.update(event):
                    kept = latest
                    metadata = {"recipe": job.recipe.name, "epoch": event.epoch}
                    if world.first:
                        save_tensors(folder.weights, training.scored_network.state_dict(), metadata)
            yield event
            if board.stopped:
                break
    _save(job, board, saver)
    saver.wait()
    board.trained = True  # from here on the network holds the kept weights, which are no state to resume from
    network = training.scored_network
    if world.first:
        network.load_state_dict(load_tensors(folder.weights))
    world.follow_first(network.state_dict().values())
    predictor = job.predictor(network)
    if kept is None:  # the best epoch was in an earlier sitting
        kept = yield from evaluate(predictor, job.val, job.loss, world)
    if not world.first:
        return
    result = _result(job, board, kept)
    counts = {"per_image": torch.from_numpy(kept.per_image), "confusion": torch.from_numpy(kept.matrix)}
    save_tensors(folder.counts, counts, {"images": list(job.val.names), "classes": list(job.val.classes)})
    write_json(folder.result, result)  # its presence says that the run has ended; pictures are no part of that
    write_pictures(folder.path, result, kept, folder.read_metrics(), predictor, job.val)
    yield Finished(folder.path, result)


def _save(job: Job, board: _Scoreboard, saver: StateSaver) -> None:
    training = job.training
    state = training.state()
    done = training.epoch * training.steps_per_epoch + training.step
    if training.world.first:  # a state to resume from must not lead straight to where the loss is not finite
        saver.save({"training": state, "scoreboard": board.state()}, done, if_finite=state["loss_sum"])


def _result(job: Job, board: _Scoreboard, evaluation: Evaluation) -> dict[str, Any]:
    """The figures of a run; every one is of the kept weights on the validation split."""
    training = job.training
    return {
        "recipe": job.recipe.name,
        "architecture": job.recipe.model.name,
        "dataset": job.recipe.data.name,
        "split": job.recipe.data.settings.val,
        **figures(evaluation, job.val.classes),
        "best_epoch": board.best.epoch,
        "epochs": training.epoch,
        "parameters": count_parameters(training.network),
        "images_per_second": training.images / max(training.seconds_training, 1e-9),
        "peak_memory_bytes": peak_memory_bytes(job.placement.device),
        "minutes": training.seconds / 60,
        "device": job.placement.device.type,
        "precision": job.placement.precision,
        "processes": training.world.size,
        "train_images": len(job.train),
        "seed": job.recipe.seed,
    }
