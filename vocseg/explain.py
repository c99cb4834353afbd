"""What ended a run, in words for its user: what happened, what is kept, and what to try."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from vocseg.build import Job
from vocseg.data.threads import HangError
from vocseg.device import out_of_memory
from vocseg.errors import (
    DataError,
    EnvironmentFault,
    Interrupted,
    Problem,
    TrainingError,
    VocsegError,
    how_to_go_on,
    one_line,
)
from vocseg.runs.folder import RunFolder
from vocseg.train.nonfinite import NonFiniteError
from vocseg.train.signals import StopRequest


@contextmanager
def explained(job: Job, folder: RunFolder, stop: StopRequest) -> Iterator[None]:
    """Inside, a run is trained and scored; whatever ends it becomes an error that says how to go on.

    Raises:
        VocsegError: always, where anything was raised inside.
    """
    kept = Problem(str(folder.path), "what was saved before is kept")
    try:
        yield
    except NonFiniteError as error:
        images = Problem(str(folder.nonfinite), "has its images; what was saved before is finite, and is kept")
        try:
            folder.add_nonfinite(asdict(error.found))
        except VocsegError as unwritten:  # which is not to hide the reason
            raise TrainingError(*error.problems, *unwritten.problems) from error
        raise TrainingError(*error.problems, images) from error
    except DataError as error:
        remedy = f"`vocseg data verify {folder.resolved}` finds every such image"
        if job.recipe.data.settings.on_bad_image == "stop":
            remedy += ', and data.on_bad_image = "skip" leaves them out of a new run'
        raise DataError(*error.problems, Problem(kept.where, f"{kept.message}; {remedy}")) from error
    except HangError as error:
        raise EnvironmentFault(*error.problems, how_to_go_on(folder.path)) from error
    except TrainingError as error:
        raise TrainingError(*error.problems, kept) from error
    except VocsegError:
        raise
    except OSError as error:
        raise EnvironmentFault(
            Problem(str(folder.path), f"{type(error).__name__}: {one_line(error)}; {how_to_go_on(folder.path)}")
        ) from error
    except (KeyboardInterrupt, SystemExit):  # a second signal
        if not stop.signal_number:
            raise
        raise Interrupted(f"stopped at once; {how_to_go_on(folder.path)}", stop.signal_number) from None
    except Exception as error:  # out of memory, or something inside a plugin
        epoch = min(job.training.epoch + 1, job.training.epochs)
        failed = f"epoch {epoch}: {type(error).__name__}: {_with_remedy(error, job)}"
        raise TrainingError(failed, kept) from error


def _with_remedy(error: Exception, job: Job) -> str:
    if out_of_memory(error):
        return f"{one_line(error)}; {_smaller(job)}"
    if "more than 1 value per channel" in str(error):
        return (
            "batch norm found one value a channel, which is no statistics; use data.batch_size of 2 or more, "
            "a larger crop, or an architecture without batch norm on its coarsest map"
        )
    return f"{one_line(error)}; `vocseg check {job.recipe.name}` tries one batch, and --debug shows where it happened"


def _smaller(job: Job) -> str:
    """What to try where training takes too much memory: batches that make the same steps, or else smaller images."""
    recipe, processes = job.recipe, job.training.world.size
    size, accumulate = job.training.batches.batch_size, recipe.train.accumulate
    parts = [n for n in range(processes, size // 2 + 1, processes) if size % n == 0]
    if parts:
        batch = f"data.batch_size = {parts[-1]} with train.accumulate = {accumulate * size // parts[-1]}"
        return f"try {batch}, which makes the same steps in less memory"
    sides = [part.params["size"] for part in recipe.augmentations if isinstance(part.params.get("size"), int)]
    crop = f" of {max(32, sides[-1] // 2)} pixels" if sides else ""
    return f"one image takes too much: try a 'crop'{crop}, a smaller network or encoder, or train.precision = \"bf16\""
