"""The composition root: a recipe becomes objects, the loop runs, and a run folder tells what came of it."""

import hashlib
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vocseg.build import Job, build
from vocseg.data.lists import first_few
from vocseg.device import choose_device, out_of_memory, peak_memory_bytes
from vocseg.distributed import World, join, launched, restarted
from vocseg.errors import DataError, EnvironmentFault, Interrupted, Problem, UsageError, how_to_go_on, one_line
from vocseg.evaluate.figures import figures
from vocseg.evaluate.validation import Evaluation, Scored, evaluate
from vocseg.explain import explained
from vocseg.network import count_parameters
from vocseg.plugins import discover
from vocseg.recipe.changes import refuse_changes
from vocseg.recipe.reader import Recipe, read_recipe
from vocseg.recipe.toml import write_value
from vocseg.report.run import write_pictures
from vocseg.runs.checkpoint import (
    StateSaver,
    check_optimizer_state,
    differing_tensors,
    load_state,
    load_tensors,
    remove_leftover_states,
    save_tensors,
    state_saver,
)
from vocseg.runs.files import remove_unfinished, write_json
from vocseg.runs.folder import RunFolder
from vocseg.runs.room import short_of_room
from vocseg.train.loop import Epoch, Step, train
from vocseg.train.scoreboard import Scoreboard
from vocseg.train.signals import StopRequest, stop_request
from vocseg.witness import share_run


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
    notes: tuple[str, ...] = ()


Event = Started | Step | Scored | Epoch | Finished


def start(recipe: Recipe, *, out: Path = Path("runs"), device: str = "auto") -> Iterator[Event]:
    """Runs a recipe into a new run folder.

    Under `torchrun` every process calls this, and all of them train together; only the first writes the folder. When
    `torchrun` has started them anew because one failed, they go on with the folder they had.

    Raises:
        VocsegError: before the folder is made, if anything cannot be built; `Interrupted` on a signal.
    """
    with join(choose_device(device)) as world, stop_request() as stop:
        before = _before_restart(world, out / recipe.name)
        if before is not None:
            with _alone(before, world):
                yield from _resume(before, device, world, stop)
            return
        with stop.at_once("stopped before training began; nothing was written"):
            job = build(recipe, device, world=world)
        recipe = job.recipe  # with the batch size that was found, where it was to be
        folder = RunFolder(out)
        if world.first:
            folder = RunFolder.create(out, recipe)
            where = job.placement
            folder.write_environment(recipe, where.describe(), where.precision, world.size, launched())
            folder.write_classes(job.train.classes, job.train.palette)
            if job.left_out:
                folder.write_bad_images(job.left_out)
        folder = RunFolder(Path(world.text_of_first(str(folder.path))))
        filled = job.network.filled
        notes = ((f"weights: {filled}",) if filled else ()) + job.notes
        with _alone(folder, world):
            yield from _execute(job, folder, _scoreboard(recipe), stop, notes)


def resume(
    path: Path, *, device: str = "auto", overrides: Sequence[str] = (), data: Path | None = None
) -> Iterator[Event]:
    """Goes on with a run from its last state, to the weights it would have had without the interruption.

    Under `torchrun` by any number of processes, whatever the number before; all of them read the run folder.

    Args:
        overrides: `key=TOML` of keys that may change within a run, `vocseg.recipe.changes.FREE`.
        data: where the run's data is now.

    Raises:
        UsageError: the path is no run folder, the run has ended, or its recipe is not the one it began with.
        DataError: the data is not what the run began with.
        EnvironmentFault: there is no whole state, another file of the run is damaged, or another process trains it.
    """
    folder = RunFolder.open(path)
    if folder.result.is_file():
        raise UsageError(Problem(str(path), f"this run has ended; its figures are in {folder.result}"))
    if data is not None:
        overrides = [*overrides, f"data.root={write_value(str(data.expanduser().absolute()))}"]
    with join(choose_device(device)) as world, stop_request() as stop, _alone(folder, world):
        yield from _resume(folder, device, world, stop, overrides)


def _resume(
    folder: RunFolder, device: str, world: World, stop: StopRequest, overrides: Sequence[str] = ()
) -> Iterator[Event]:
    state, problems = load_state(folder.path, folder.id)
    with _expecting_a_state(folder):
        recipe = run_recipe(folder, overrides)
        refuse_changes(state["recipe"], recipe, folder.path)
        done = float(state["training"]["epoch"]), float(state["training"]["step"])
    if world.largest(*done) != [*done]:
        raise EnvironmentFault(Problem(str(folder.path), "the processes read different states of this run; try again"))
    with stop.at_once(f"stopped before training went on; {how_to_go_on(folder.path)}"):
        left_out = folder.read_bad_images()
        job = build(recipe, device, pretrained=False, precision=folder.precision, left_out=left_out, world=world)
    with _expecting_a_state(folder):
        changed = "; ".join(_changed(state["images"], _images(job)))
    if changed:
        remedy = "give the folder that holds those by --data"
        problem = f"its images are not those that the run began with ({changed}); {remedy}"
        raise DataError(Problem(recipe.data.settings.root, problem))
    board = _scoreboard(recipe)
    with _expecting_a_state(folder):
        check_optimizer_state(state["training"]["optimizer"], job.training.optimizer)
        job.training.load(state["training"])
        board.load(state["scoreboard"])
    folder.read_nonfinite()
    records = folder.read_metrics()  # what the end of the run needs is missed now, not then
    if board.best.epoch:
        differing = differing_tensors(load_tensors(folder.weights), job.training.network.state_dict())
        if differing:
            changed = f"not the weights of this run's network; see '{differing[0]}'; put back the file that was here"
            raise EnvironmentFault(Problem(str(folder.weights), changed))
    if world.first:
        remove_unfinished(folder.path)
        if overrides:
            folder.write_resolved(recipe)  # what is changed stays so, and is there to be read
        if not problems:
            remove_leftover_states(folder.path)
    notes = tuple(f"{problem}; going on from the newest whole state" for problem in problems)
    lost = job.training.epoch - sum(record["epoch"] <= job.training.epoch for record in records)
    if lost > 0:
        notes += (f"{folder.metrics}: the records of {lost} epochs are missing, and will be from the curves",)
    yield from _execute(job, folder, board, stop, notes)


@contextmanager
def _alone(folder: RunFolder, world: World) -> Iterator[None]:
    """Holds the folder's lock; the first process does, for all that train together."""
    with ExitStack() as held:
        refused = ""
        if world.first:
            try:
                held.enter_context(folder.lock())
            except EnvironmentFault as error:
                refused = str(error)
        refused = world.text_of_first(refused)
        if refused:
            raise EnvironmentFault(refused)
        yield


@contextmanager
def _expecting_a_state(folder: RunFolder) -> Iterator[None]:
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        reason = f"its state is not one of its recipe's network and optimizer: {one_line(error)}"
        raise EnvironmentFault(Problem(str(folder.path), reason)) from error


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


def _scoreboard(recipe: Recipe) -> Scoreboard:
    rule = recipe.early_stopping
    return Scoreboard(recipe.evaluate.metric, (rule.metric, rule.mode, rule.patience) if rule else None)


def _execute(
    job: Job, folder: RunFolder, board: Scoreboard, stop: StopRequest, notes: tuple[str, ...]
) -> Iterator[Event]:
    training, recipe = job.training, job.recipe
    world = training.world
    if world.first:
        notes += short_of_room(folder.path, training.network, training.optimizer, training.ema is not None)
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

    share_run(folder.path)
    with (
        explained(job, folder, stop),
        state_saver(folder.path, folder.id if world.first else "") as saver,
        # No thread goes on reading for a run that was stopped, whoever holds the error that says so.
        closing(_train_and_score(job, folder, board, saver, stop)) as events,
    ):
        yield from _save_when_due(events, job, folder, board, saver, stop)


def _save_when_due(
    events: Iterator[Event], job: Job, folder: RunFolder, board: Scoreboard, saver: StateSaver, stop: StopRequest
) -> Iterator[Event]:
    """Passes events on, saving the state now and then, and all of it before stopping on a signal."""
    training = job.training
    belongs_to = {"recipe": job.recipe.resolved, "images": _images(job)}
    saved = time.monotonic()
    for event in events:
        if isinstance(event, Finished):
            yield event
            continue
        # Kept weights and the state that knows of them belong together; and nothing is trained after the last epoch.
        kept = isinstance(event, Epoch) and (board.best.epoch == event.epoch or board.stopped or training.ended)
        if kept:
            _save(job, board, saver, belongs_to)
            saved = time.monotonic()
        yield event  # now, for whoever takes it may not come back
        due = time.monotonic() - saved >= job.recipe.train.checkpoint_minutes * 60
        # A signal may come to one process, or to all between different steps: they save and stop together.
        save_now, signal_number = map(int, training.world.largest(due, stop.signal_number))
        if not kept and not board.trained and (save_now or signal_number):
            _save(job, board, saver, belongs_to)
            saved = time.monotonic()
        if signal_number:
            saver.wait()
            raise Interrupted(
                f"stopped in epoch {min(training.epoch + 1, training.epochs)} of {training.epochs}, all saved; "
                f"{how_to_go_on(folder.path)}",
                signal_number,
            )


def _train_and_score(
    job: Job, folder: RunFolder, board: Scoreboard, saver: StateSaver, stop: StopRequest
) -> Generator[Event, None, None]:
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
            if isinstance(event, Step) and event.left_out is not None and world.first:
                folder.add_nonfinite(asdict(event.left_out))
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
    result = _result(job, folder, board, kept)
    counts = {"per_image": torch.from_numpy(kept.per_image), "confusion": torch.from_numpy(kept.matrix)}
    save_tensors(folder.counts, counts, {"images": list(job.val.names), "classes": list(job.val.classes)})
    undrawn: Exception | None = None
    with stop.at_once(f"stopped while the pictures were drawn; they follow where you {how_to_go_on(folder.path)}"):
        try:
            write_pictures(folder.path, result, kept, folder.read_metrics(), predictor, job.val)
        except Exception as error:  # which must not cost the figures
            undrawn = error
    write_json(folder.result, result)  # its presence says that the run has ended
    yield Finished(folder.path, result, tuple(_left_out(job, folder, result)))
    if undrawn is not None:
        reason = f"not all pictures could be drawn ({one_line(undrawn)}); all else is there"
        raise EnvironmentFault(Problem(str(folder.path), reason)) from undrawn


def _left_out(job: Job, folder: RunFolder, result: dict[str, Any]) -> Iterator[str]:
    """What the figures were made without, to be read last."""
    names = [f"{name} ({split})" for split, bad in job.left_out.items() for name in bad]
    if names:
        yield f"{len(names)} images left out, reasons in {folder.bad_images}: {first_few(names, 100)}"
    if result["steps_left_out"]:
        yield f"{result['steps_left_out']} steps left out, whose loss or gradient was not finite: {folder.nonfinite}"


def _images(job: Job) -> dict[str, list[Any]]:
    """What tells the images of both splits from others, wherever they lie: their number, and their names' digest."""
    splits = {"train": job.train.names, "val": job.val.names}
    return {s: [len(names), hashlib.sha256("\n".join(names).encode()).hexdigest()] for s, names in splits.items()}


def _changed(then: dict[str, list[Any]], now: dict[str, list[Any]]) -> Iterator[str]:
    for split, (count, digest) in now.items():
        count_then, digest_then = then[split]
        if count != count_then:
            yield f"{split}: {count_then} then, {count} now"
        elif digest != digest_then:
            yield f"{split}: {count} of other names"


def _save(job: Job, board: Scoreboard, saver: StateSaver, belongs_to: dict[str, Any]) -> None:
    training = job.training
    state = training.state()
    done = training.epoch * training.steps_per_epoch + training.step
    if training.world.first:  # a state to resume from must not lead straight to where the loss is not finite
        saved = {"training": state, "scoreboard": board.state(), **belongs_to}
        saver.save(saved, done, only_if=lambda copy: training.is_finite(copy["training"]))


def _result(job: Job, folder: RunFolder, board: Scoreboard, evaluation: Evaluation) -> dict[str, Any]:
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
        "bad_images": {split: list(bad) for split, bad in job.left_out.items()},
        "steps_left_out": sum(found["skipped"] for found in folder.read_nonfinite()),
        "seed": job.recipe.seed,
    }
