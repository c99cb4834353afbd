"""Trying a recipe: everything is built, one batch goes forward and backward, and nothing is trained or written."""

from typing import Any

import torch

from vocseg.build import Job, build
from vocseg.errors import Problem, TrainingError, UsageError
from vocseg.network import count_parameters, kept_for_backward, outputs, set_training
from vocseg.recipe.reader import Recipe
from vocseg.train.feed import on_device
from vocseg.train.loop import combined_loss


def try_recipe(recipe: Recipe) -> dict[str, Any]:
    """Builds a recipe on the CPU and tries one training batch.

    Memory is what training needs beyond images in flight: weights, gradients, optimizer state and average of the
    weights are counted, activations are summed over what autograd keeps for the backward pass of this batch.

    Raises:
        VocsegError: whatever would have stopped the run.
    """
    job = build(recipe, "cpu")
    training = job.training
    batches = training.batches.epoch(0)
    pixels, masks = next(on_device(batches, training.placement))
    batches.close()
    set_training(training.network, training.backbone, frozen=training.frozen_epochs > 0)
    source = recipe.model.component.source
    try:
        with kept_for_backward(training.network) as kept, training.placement.autocast():
            named = outputs(training.network, training.normalization(pixels), training.stride)
        loss = combined_loss(training.loss, named, masks.long())
        loss.backward()
    except Exception as error:
        failed = f"'{recipe.model.name}' failed on a batch of images {tuple(pixels.shape)}"
        raise UsageError(Problem(source, f"{failed}: {type(error).__name__}: {error}")) from error
    if not torch.isfinite(loss):
        raise TrainingError(Problem(source, f"the loss of the first batch is {loss.item()}"))
    return _report(job, pixels, loss.item(), kept.bytes)


def _report(job: Job, pixels: torch.Tensor, loss: float, activations: int) -> dict[str, Any]:
    training, recipe = job.training, job.recipe
    network = training.network
    weights = sum(p.nbytes for p in network.parameters())
    trained = [p for p in network.parameters() if p.requires_grad]
    gradients = sum(p.nbytes for p in trained)
    before = [p.detach().clone() for p in trained]
    training.optimizer.step()  # only a step shows what an optimizer keeps for each weight
    kept = [value for entry in training.optimizer.state.values() for value in entry.values()]
    state = sum(value.nbytes for value in kept if isinstance(value, torch.Tensor))
    moved = sum(not torch.equal(old, new) for old, new in zip(before, trained, strict=True))
    average = weights if training.ema is not None else 0
    stop = recipe.early_stopping
    plan = f"{training.epochs} epochs of {training.steps_per_epoch} steps"
    if training.limit_seconds is not None:
        plan += f", at most {training.limit_seconds / 60:g} minutes"
    if stop is not None:
        plan += f", stopping when {stop.metric} has not improved {stop.patience} times"
    batch, height, width = pixels.shape[:3]
    return {
        "recipe": recipe.name,
        "architecture": recipe.model.name,
        "weights": str(job.network.filled or "none"),
        "parameters": count_parameters(network),
        "trained_at_first": sum(p.numel() for p in trained),
        "moved_by_one_step": f"{moved} of {len(trained)} tensors",
        "training_images": len(job.train),
        "validation_images": len(job.val),
        "classes": len(job.train.classes),
        "batch": f"{batch} x {height} x {width}",
        "first_loss": round(loss, 4),
        "precision_here": training.placement.precision,
        "plan": plan,
        "weights_bytes": weights,
        "gradients_bytes": gradients,
        "optimizer_bytes": state,
        "average_bytes": average,
        "activations_bytes": activations,
        "total_bytes": weights + gradients + state + average + activations,
    }
