"""The conformance checks, in the order in which they are made and reported.

A check gets a `Trial` and returns a `Finding`; an exception that comes out of it is a failure of that check. It is not
tried if one of those it needs has failed.
"""

import contextlib
import io
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode

from vocseg.errors import UsageError, did_you_mean
from vocseg.network import DEFAULT_STRIDE, count_parameters, kept_for_backward, outputs, parameter_groups
from vocseg.testing.report import Row, Verdict
from vocseg.testing.subject import Subject, accept, beyond_bounds, checked_params
from vocseg.testing.trial import (
    CLASSES,
    LIKE_IMAGENET,
    OTHER_SEED,
    Attempt,
    NeedsConnection,
    Trial,
    empty,
    equal,
    extent,
    joined,
    logits_of,
    named,
    place_of,
    said,
    shown,
    threads,
)

CLASS_COUNTS = (1, 2, CLASSES, 151)
LONGEST_STEP = 10.0  # seconds; a longer training step is reckoned from a shorter one


@dataclass(frozen=True)
class Finding:
    """What a check found; see `Row`."""

    verdict: Verdict
    found: str
    remedy: str = ""
    value: float | None = None
    error: BaseException | None = None


@dataclass(frozen=True)
class Check:
    name: str
    run: Callable[[Trial], Finding]
    needs: tuple[str, ...]
    remedy: str  # where the plugin raises


CHECKS: list[Check] = []


def check(name: str, *needs: str, remedy: str = "mend what raises it") -> Callable:
    """Adds a check to `CHECKS`."""

    def add(run: Callable[[Trial], Finding]) -> Callable[[Trial], Finding]:
        CHECKS.append(Check(name, run, needs, remedy))
        return run

    return add


def rows(subject: Subject, params: Mapping[str, Any], without: Sequence[str] = ()) -> Iterator[Row]:
    """Makes all checks of one architecture, and yields the row of each as soon as it is known.

    Args:
        params: the architecture's own; its defaults for those that are left out.
        without: names of checks to leave out.

    Raises:
        UsageError: a parameter cannot be used, or no check has that name.
    """
    known = [c.name for c in CHECKS]
    wrong = [f"no check is named '{name}'{did_you_mean(name, known)}" for name in without if name not in known]
    if wrong:
        raise UsageError(*wrong)
    trial = Trial(subject, checked_params(subject, params))
    missed: set[str] = set()
    for each in CHECKS:
        if each.name in without:
            continue
        if unmet := [need for need in each.needs if need in missed]:
            finding = Finding("skip", f"not tried, because {unmet[0]} failed")
        else:
            finding = _made(each, trial)
        if finding.verdict in ("fail", "skip"):
            missed.add(each.name)
        yield Row(subject.name, each.name, **vars(finding))


def _made(each: Check, trial: Trial) -> Finding:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a check makes networks do what nobody else asks of them
        try:
            return each.run(trial)
        except (Exception, SystemExit) as error:
            return fail(located(error, trial), each.remedy, error)


def located(error: BaseException, trial: Trial, *, brief: bool = False) -> str:
    """An exception on one line, with its place in the plugin."""
    place = place_of(error, trial.subject.file)
    return f"{said(error, brief=brief)} ({place})" if place else said(error, brief=brief)


def told(attempt: Attempt, trial: Trial) -> str:
    """What came of an image size that does not work."""
    size = shown(attempt.size)
    if attempt.error is not None:
        return f"images of {size} fail with {located(attempt.error, trial)}"
    return f"images of {size} give logits of {shown(attempt.logits)}"


def passed(found: str) -> Finding:
    return Finding("pass", found)


def warn(found: str, remedy: str, error: BaseException | None = None) -> Finding:
    return Finding("warn", found, remedy, error=error)


def fail(found: str, remedy: str, error: BaseException | None = None) -> Finding:
    return Finding("fail", found, remedy, error=error)


def info(found: str, value: float | None = None) -> Finding:
    return Finding("info", found, value=value)


# The file


@check("signature")
def _signature(trial: Trial) -> Finding:
    subject = trial.subject
    if subject.component is None:
        remedy = "the contract: @architecture above def name(num_classes: int, *, key: type = default) -> nn.Module"
        return fail(subject.unreadable, remedy)
    if subject.clash:
        return fail(subject.clash, "a recipe that names it finds both and takes neither")
    if not subject.component.doc:
        return warn("read without running the file; no docstring", "say in a line what it is, for `vocseg list`")
    keys = [p.name for p in subject.component.parameters]
    return passed(f"read without running the file; recipe keys: {', '.join(keys) or 'none'}")


@check("bounds", "signature", remedy="give the parameter a type and bounds that go together")
def _bounds(trial: Trial) -> Finding:
    component = trial.subject.component
    assert component is not None
    wrong, refused = [], 0
    for parameter in component.parameters:
        try:
            if not parameter.required and parameter.default is not None:
                accept(parameter, parameter.default)
        except ValueError as error:
            wrong.append(f"the default of '{parameter.name}' breaks its own type: {error}")
        except Exception as error:
            wrong.append(f"'{parameter.name}' cannot be checked: {said(error)}")
            continue
        for value in beyond_bounds(parameter.annotation):
            try:
                accept(parameter, value)
            except ValueError:
                refused += 1
            else:
                wrong.append(f"'{parameter.name}' takes {value!r}, which is beyond its bounds")
    if wrong:
        return fail("; ".join(wrong), "give the parameter a type, bounds and a default that go together")
    if not component.parameters:
        return passed("no parameters")
    beyond = f"{refused} values beyond their bounds refused" if refused else "none has bounds"
    return passed(f"defaults keep to their types; {beyond}")


@check("file", remedy="`python FILE` shows where it fails")
def _file(trial: Trial) -> Finding:
    assert trial.function is not None
    return passed(f"imports ({trial.subject.source})")


# Building


@check("offline", "file")
def _offline(trial: Trial) -> Finding:
    try:
        built = f"building {type(trial.network).__name__}"
    except NeedsConnection as error:
        remedy = "build with random weights (pretrained=False, weights=None); model.weights loads others"
        return fail(located(error, trial), remedy, error)
    except (Exception, SystemExit):  # which is what the next check tells
        built = "building, as far as it goes,"
    return passed(f"{built} opens no connection")


@check("build", "file", "offline")
def _build(trial: Trial) -> Finding:
    network = trial.network
    params = "".join(f", {name} = {value!r}" for name, value in trial.params.items())
    return passed(f"{type(network).__name__} for {CLASSES} classes{params}")


@check("training-mode", "build")
def _training_mode(trial: Trial) -> Finding:
    if names := trial.built.in_eval_mode:
        return fail(f"in eval mode after building: {joined(names)}", "return network.train()")
    return passed("all modules are in training mode after building")


@check("weights", "build")
def _weights(trial: Trial) -> Finding:
    tensors = [*trial.network.named_parameters(), *trial.network.named_buffers()]
    if not trial.built.parameters:
        return fail("the network has no parameters", "assign its layers to attributes of the module")
    lazy = [name for name, tensor in tensors if is_lazy(tensor)]
    if lazy:
        return fail(f"no size yet: {joined(lazy)}", "use layers with their sizes given rather than lazy ones")
    dtypes = [f"{n} is {t.dtype}" for n, t in tensors if t.is_floating_point() and t.dtype != torch.float32]
    if dtypes:
        return fail(joined(dtypes), "leave weights in float32; train.precision sets the precision of training")
    away = [f"{name} is on {tensor.device}" for name, tensor in tensors if tensor.device.type != "cpu"]
    if away:
        return fail(joined(away), "build on the CPU; vocseg moves the network to its device")
    odd = [name for name, tensor in tensors if tensor.is_floating_point() and not math.isfinite(sum(extent(tensor)))]
    if odd:
        return fail(f"not finite: {joined(odd)}", "initialise it; torch.empty holds whatever was in memory")
    return passed("float32, on the CPU, finite")


@check("seed", "build", "weights")
def _seed(trial: Trial) -> Finding:
    # The network is as it was built: this comes before whatever settles it.
    first, again = trial.network.state_dict(), trial.build().state_dict()
    names = [name for name, tensor in first.items() if name not in again or not equal(tensor, again[name])]
    if names or first.keys() != again.keys():
        remedy = "draw from torch's own generator, which train seeds; not from random, numpy or uninitialised memory"
        return fail(f"two builds with one seed differ in {joined(names) or 'their names'}", remedy)
    return passed("the same seed gives the same weights")


@check("encoder", "build", "weights")
def _encoder(trial: Trial) -> Finding:
    attribute = trial.subject.backbone
    if not attribute:
        found = "none is set apart: no imagenet weights, freezing or learning rate of its own"
        return info(f"{found} (@architecture(backbone=…))")
    try:
        encoder = trial.backbone
    except AttributeError as error:
        children = [name for name, _ in trial.network.named_children()]
        found = f'marked backbone="{attribute}", and the module has no such submodule'
        return fail(found, f"name one of its submodules: {joined(children, 8)}", error)
    assert encoder is not None
    every = {id(p): name for name, p in trial.network.named_parameters()}
    groups = parameter_groups(trial.network, encoder)
    grouped = [id(p) for group in groups for p in group["params"]]
    stray = [name for name, p in encoder.named_parameters() if id(p) not in every]
    if stray or sorted(grouped) != sorted(every):
        found = joined([f"{attribute}.{name}" for name in stray] or [every[i] for i in every.keys() - set(grouped)])
        return fail(f"not a parameter of the network: {found}", f"assign the encoder to self.{attribute} itself")
    counts = {group["name"]: sum(p.numel() for p in group["params"]) for group in groups}
    if not counts.get("encoder"):
        return fail(f"'{attribute}' has no parameters", "name the submodule that is pretrained")
    if not counts.get("decoder"):
        return fail(f"'{attribute}' has all parameters", "leave the layers that are not pretrained out of it")
    return passed(f"{attribute} {counts['encoder']:,}, the rest {counts['decoder']:,} parameters; each in one group")


# Shapes


@check("forward", "build", "weights", remedy="make it run on float images (b, 3, h, w) of any size")
def _forward(trial: Trial) -> Finding:
    logits = trial.reference.logits
    if logits.ndim != 4 or not logits.is_floating_point():
        found = f"{len(trial.images)} images give {logits.dtype} of shape {tuple(logits.shape)}"
        return fail(found, "return logits: numbers of a floating type, (b, num_classes, h, w)")
    return passed(f"runs on {len(trial.images)} images of {shown(trial.size)}")


@check("output", "forward")
def _output(trial: Trial) -> Finding:
    returned = trial.reference.returned
    remedy = "return the logits, or a mapping with 'out' and auxiliary logits"
    if not isinstance(returned, Tensor | Mapping):
        return fail(f"the network returned a {type(returned).__name__}", remedy)
    if isinstance(returned, Mapping) and not isinstance(returned.get("out"), Tensor):
        return fail(f"the network returned a mapping with {sorted(map(str, returned))}, and no 'out'", remedy)
    logits = trial.reference.logits
    shape = tuple(logits.shape)
    if shape[0] != 2:
        return fail(f"2 images give logits for {shape[0]}", "return (b, num_classes, h, w)")
    if not Attempt(trial.size, trial.sides.unit, shape[2:]).good:
        found = f"images of {shown(trial.size)} give logits of {shown(shape[2:])}"
        return fail(found, "return them at the images' size, or at the same whole fraction of height and width")
    if logits.dtype != torch.float32:
        return fail(f"logits are {logits.dtype} for float32 images", "return float32 logits")
    return passed(f"float32 logits {shape} for images of {shown(trial.size)}")


@check("auxiliary", "forward", "output")
def _auxiliary(trial: Trial) -> Finding:
    others = {name: v for name, v in named(trial.reference.returned).items() if name != "out"}
    if not others:
        return info("no auxiliary logits")
    wrong = []
    for name, logits in others.items():
        if not isinstance(logits, Tensor):
            wrong.append(f"'{name}' is a {type(logits).__name__}")
        elif logits.ndim != 4 or logits.shape[:2] != (2, CLASSES) or not logits.is_floating_point():
            wrong.append(f"'{name}' is {tuple(logits.shape)} {logits.dtype}".replace("torch.", ""))
    if wrong:
        return fail(joined(wrong), f"auxiliary logits are floats (b, num_classes, h', w'), here (2, {CLASSES}, …)")
    return passed(f"{', '.join(f'{name} {tuple(logits.shape)}' for name, logits in others.items())}")


@check("classes", "forward")
def _classes(trial: Trial) -> Finding:
    wrong, last = [], None
    for count in CLASS_COUNTS:
        classes = f"for {count} class{'es' * (count > 1)}"
        try:
            channels = _channels(trial, count)
        except Exception as error:
            wrong.append(f"{classes}: {located(error, trial)}")
            last = error
        else:
            wrong += [f"{classes}: {channels} channel{'s' * (channels != 1)}"] if channels != count else []
    if wrong:
        return fail("; ".join(wrong), "give the last layer num_classes channels, also for one class", last)
    return passed(f"as many channels for {', '.join(map(str, CLASS_COUNTS))} classes")


def _channels(trial: Trial, count: int) -> int:
    side = trial.sides.side
    if trial.probe is not trial.network:
        with contextlib.suppress(Exception):  # what fails without numbers is tried with them
            network = trial.probe if count == CLASSES else trial.build(count, device="meta")
            return logits_of(trial.shapes(network, side, side)).shape[1]
    network = trial.network if count == CLASSES else trial.build(count)
    return logits_of(trial.shapes(network, side, side)).shape[1]


@check("stride", "output")
def _stride(trial: Trial) -> Finding:
    given = getattr(trial.network, "stride", None)
    sides = trial.sides
    if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
        found = f"the module's 'stride' is {given!r}"
        return fail(found, "set network.stride to one whole number: what the sides of images must be a multiple of")
    stated = f"{sides.claimed}" if given is not None else f"{DEFAULT_STRIDE} (the module says none)"
    if sides.first.good:
        return passed(f"{stated}; {shown(sides.first.size)} works")
    if sides.unit == sides.claimed:
        found = f"{told(sides.first, trial)}; {sides.side}x{sides.side} works"
        return warn(found, f"images below {sides.side} pixels cannot be used; pad small maps inside the network")
    remedy = f"set stride = {sides.unit} on the module; sides of {sides.side} work"
    return fail(f"the stride is {stated}, but {told(sides.first, trial)}", remedy, sides.first.error)


@check("sizes", "output", remedy="take height and width from the images that forward is given")
def _sizes(trial: Trial) -> Finding:
    side, unit = trial.sides.side, trial.sides.unit
    for height, width in ((side, 2 * side), (3 * side, side)):
        attempt = trial.attempt(height, width, unit)
        if not attempt.good:
            remedy = "take height and width from the images; they are not square"
            return fail(told(attempt, trial), remedy, attempt.error)
    padded = [(side + 1, side + 5), (2 * side - 1, side - 1)]
    for height, width in padded:
        with torch.no_grad():
            logits = outputs(trial.probe.eval(), empty(trial.probe, 2, height, width), unit)["out"]
        assert logits.shape[-2:] == (height, width)  # `outputs` has seen to that
    return passed(f"{side}x{2 * side} and {3 * side}x{side}; padded and cropped {', '.join(map(shown, padded))}")


# Evaluation


@check("fp32", "forward", remedy="mend what raises it")
def _fp32(trial: Trial) -> Finding:
    finite = trial.reference.logits.isfinite()
    if not finite.all():
        share = 1 - finite.float().mean().item()
        return fail(f"{share:.1%} of the logits are not finite", "look for divisions, logarithms and roots near zero")
    return passed("logits are finite")


@check("image", "forward", "fp32")
def _image(trial: Trial) -> Finding:
    contrast, scale = trial.contrast, trial.reference.logits.abs().max().item()
    if contrast <= 1e-6 * scale:
        return fail("two images that differ have the same logits", "look for where the image gets lost in forward")
    return passed(f"logits of two images differ by up to {contrast:.2g}, of {scale:.2g}")


@check("input", "forward")
def _input(trial: Trial) -> Finding:
    if trial.reference.image_changed:
        remedy = "let the first operation not be in place (inplace=True, relu_, +=), or copy the image"
        return fail("forward changes the images that it is given", remedy)
    return passed("images are as they were after forward")


@check("state", "forward")
def _state(trial: Trial) -> Finding:
    names = {name for name, _ in trial.network.named_parameters()}
    late = sorted(names - trial.built.parameters)
    if late:
        remedy = "make all layers in __init__: the optimizer gets the parameters before the first forward"
        return fail(f"parameters that only forward makes: {joined(late)}", remedy)
    if changed := trial.reference.state_changed:
        remedy = "change them in training only (if self.training:)"
        return fail(f"forward in eval mode changes {joined(changed)}", remedy)
    return passed("forward in eval mode changes no parameter and no buffer")


@check("deterministic", "forward", "fp32")
def _deterministic(trial: Trial) -> Finding:
    again = trial.evaluate(trial.images, seed=OTHER_SEED)
    if apart := trial.difference(again, trial.reference.logits):
        remedy = "let dropout know the mode: nn.Dropout, or F.dropout(x, p, self.training)"
        return fail(f"the same images give {apart} the second time", remedy)
    return passed("in eval mode, the same images give the same logits")


@check("batch-1-eval", "forward", remedy="make it run on a single image in eval mode, which is how it is scored")
def _batch_1_eval(trial: Trial) -> Finding:
    if len(trial.alone) != 1:
        return fail(f"one image gives logits for {len(trial.alone)}", "keep the batch dimension; squeeze no size 1")
    return passed("a single image runs in eval mode")


@check("neighbours", "batch-1-eval", "deterministic")
def _neighbours(trial: Trial) -> Finding:
    if apart := trial.difference(trial.alone, trial.reference.logits[:1]):
        remedy = "use no statistics of the batch in eval mode: track_running_stats=True, no mean over dimension 0"
        return fail(f"an image alone gives {apart} from within a batch", remedy)
    return passed("an image's logits do not depend on the rest of the batch")


@check("channels-last", "deterministic", remedy="use reshape in place of view, or contiguous() before it")
def _channels_last(trial: Trial) -> Finding:
    network: Any = trial.settled
    try:
        network.to(memory_format=torch.channels_last)
        found = trial.evaluate(trial.images.contiguous(memory_format=torch.channels_last))
    finally:
        network.to(memory_format=torch.contiguous_format)
    if apart := trial.difference(found, trial.reference.logits):
        return fail(f"images in channels_last give {apart}", "use reshape or flatten in place of view and strides")
    return passed("channels_last gives the same logits")


@check(
    "round-trip",
    "deterministic",
    remedy="register all weights, and in __init__: layers as attributes or in a ModuleList",
)
def _round_trip(trial: Trial) -> Finding:
    fresh = trial.build(seed=OTHER_SEED)
    fresh.load_state_dict(trial.settled.state_dict())
    if apart := trial.difference(trial.evaluate(trial.images, network=fresh), trial.reference.logits):
        remedy = "register what it computes with: layers in nn.ModuleList (no plain list), tensors by register_buffer"
        return fail(f"a fresh build with this state dict gives {apart}", remedy)
    return passed("a fresh build with this state dict gives the same logits")


# Training


@check("gradients", "forward", "fp32")
def _gradients(trial: Trial) -> Finding:
    asked = {name: p.requires_grad for name, p in trial.settled.named_parameters()}
    with trial.training() as network:
        loss = trial.train_step(trial.images)
        got = {name: p.grad for name, p in network.named_parameters() if asked[name]}
    none = [name for name, gradient in got.items() if gradient is None]
    encoder = f"{trial.subject.backbone}." if trial.subject.backbone else ()
    unused = [name for name in none if encoder and name.startswith(encoder)]
    used = [name for name in got if encoder and name.startswith(encoder) and name not in none]
    if none and not (none == unused and used):
        remedy = "use it in forward without detach or no_grad, or delete it"
        return fail(f"{len(none)} of {len(got)} parameters get none: {joined(none)}", remedy)
    extents = {name: extent(gradient) for name, gradient in got.items() if gradient is not None}
    odd = [name for name, (low, high) in extents.items() if not math.isfinite(low + high)]
    if odd or not loss.isfinite():
        remedy = "look for divisions, logarithms and roots near zero"
        return fail(f"not finite: {joined(odd) or 'the loss'}", remedy)
    if unused:  # which many are: a decoder that stops early, or a classifier's last layer kept for its weights
        remedy = "they only take memory: cut the encoder off where the decoder stops reading it"
        return warn(f"{len(unused)} of the encoder's get none: {joined(unused)}", remedy)
    if zero := [name for name, (low, high) in extents.items() if low == high == 0]:
        remedy = "look whether it has an effect on the logits, or sits before a ReLU that never opens"
        return warn(f"exactly zero: {joined(zero)}", remedy)
    if fixed := [name for name, asks in asked.items() if not asks]:
        return warn(f"parameters that ask for none: {joined(fixed)}", "make them buffers: freezing and thawing sets it")
    return passed(f"all {len(got)} parameters get one, and it is finite")


@check("batch-1-train", "forward")
def _batch_1_train(trial: Trial) -> Finding:
    side = trial.fitting(LIKE_IMAGENET)
    try:
        with trial.training(trial.hollow) as network, torch.no_grad():
            trial.run(network, empty(network, 1, side, side))
    except Exception as error:
        why = "batch norm finds one value a channel" if "more than 1 value per channel" in str(error) else ""
        found = f"fails at batch 1 in training: {why or located(error, trial)}"
        return warn(found, "use data.batch_size of 2 or more, and no last batch of one; or group norm there", error)
    return passed("a batch of one image can be trained on")


@check("bf16", "forward", "fp32", remedy='let dtypes follow the inputs; until then, train.precision = "fp32"')
def _bf16(trial: Trial) -> Finding:
    remedy = 'compute that step in float32 (with torch.autocast(..., enabled=False)), or use train.precision = "fp32"'
    with torch.autocast("cpu", torch.bfloat16):
        logits = trial.evaluate(trial.images)
    if not logits.isfinite().all():
        return fail("logits are not finite under bf16 autocast", remedy)
    with trial.training() as network:
        loss = trial.train_step(trial.images, bf16=True)
        odd = [
            n for n, p in network.named_parameters() if p.grad is not None and not math.isfinite(sum(extent(p.grad)))
        ]
    if odd or not loss.isfinite():
        return fail(f"not finite in a bf16 training step: {joined(odd) or 'the loss'}", remedy)
    return passed("logits and gradients are finite under bf16 autocast")


@check("freezing", "encoder", "gradients")
def _freezing(trial: Trial) -> Finding:
    encoder = trial.backbone
    if encoder is None:
        return info("no encoder to freeze")
    buffers = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    inside = {id(p) for p in encoder.parameters()}
    with trial.training(frozen=True) as network:
        trial.train_step(trial.images)
        moved = [name for name, buffer in encoder.named_buffers() if not equal(buffer, buffers[name])]
        learning = [n for n, p in network.named_parameters() if id(p) in inside and p.grad is not None]
        still = [n for n, p in network.named_parameters() if id(p) not in inside and p.requires_grad and p.grad is None]
    if learning:
        return fail(f"frozen, but gets gradients: {joined(learning)}", "let forward not set requires_grad")
    if moved:
        remedy = "go by the layer's own mode (layer.training), not by the network's self.training"
        return fail(f"frozen, but forward changes {joined(moved)}", remedy)
    if still:
        return fail(f"with the encoder frozen, no gradient for {joined(still)}", "let the decoder not depend on it")
    return passed("a frozen encoder gets no gradients and keeps its buffers; the rest learns")


@check("global-state", "file")
def _global_state(trial: Trial) -> Finding:
    if trial.moved:
        remedy = "leave global settings alone: they are the recipe's, and other networks' too"
        return fail("; ".join(trial.moved.values()), remedy)
    return passed("torch's seed, dtype, threads and modes are left alone")


# Compilers


@check("export", "deterministic")
def _export(trial: Trial) -> Finding:
    remedy = "matters for deploying by export only: no .item(), and no control flow on values"
    network, images = trial.settled.eval(), trial.images[:1]
    try:
        with silence(), torch.no_grad():
            found = logits_of(named(torch.export.export(network, (images,)).module()(images)))
    except Exception as error:
        return warn(f"torch.export fails: {located(error, trial, brief=True)}", remedy, error)
    if apart := trial.difference(found, trial.reference.logits[:1]):
        return warn(f"the exported network gives {apart}", remedy)
    return passed("torch.export gives the same logits")


@check("compile", "deterministic")
def _compile(trial: Trial) -> Finding:
    broken = None
    try:
        with silence(), trial.training() as network, torch.no_grad():
            expected = logits_of(trial.run(network, trial.images))
            try:
                found = _compiled(trial, network, whole=True)
            except Exception as error:
                broken = error
                found = _compiled(trial, network, whole=False)
    except Exception as error:
        return warn(f"torch.compile fails: {located(error, trial, brief=True)}", "leave train.compile = false", error)
    finally:
        torch.compiler.reset()
    if apart := trial.difference(found, expected):
        return warn(f"the compiled network gives {apart}", "leave train.compile = false")
    if broken is not None:
        remedy = "matters for train.compile only, which gains less: no .item(), print or Python on values"
        return warn(f"torch.compile takes it in pieces: {located(broken, trial, brief=True)}", remedy, broken)
    return passed("torch.compile takes it whole, and gives the same logits")


def _compiled(trial: Trial, network: nn.Module, *, whole: bool) -> Tensor:
    """The logits of the network as Dynamo captures it; what a backend makes of that is not the author's affair."""
    torch.compiler.reset()
    return logits_of(trial.run(torch.compile(network, backend="eager", fullgraph=whole), trial.images))


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keeps torch's compilers from telling all they know; the exception says enough."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


# Facts


@check("parameters", "build", "weights")
def _parameters(trial: Trial) -> Finding:
    count = count_parameters(trial.network)
    return info(f"{count:,}", count)


@check("flops", "forward")
def _flops(trial: Trial) -> Finding:
    side = trial.fitting(LIKE_IMAGENET)
    with FlopCounterMode(display=False) as counter:
        trial.shapes(trial.hollow, side, side)
    flops = counter.get_total_flops() // 2  # of two images
    amount = f"{flops / 1e9:,.1f} GFLOP" if flops >= 1e8 else f"{flops / 1e6:,.1f} MFLOP"
    return info(f"{amount} for one image of {side}x{side}, a multiply-add counted as two", flops)


@check("memory", "forward")
def _memory(trial: Trial) -> Finding:
    network, side = trial.hollow, trial.fitting(LIKE_IMAGENET)
    images = empty(network, 2, side, side)
    with trial.training(network), kept_for_backward(network, images) as kept:
        network(images)
    size = kept.bytes // 2  # of two images, since some networks take no single one in training
    amount = f"{size / 2**20:,.{0 if size >= 10 << 20 else 1}f} MiB"
    return info(f"{amount} of activations to train on one image of {side}x{side}, fp32", size)


@check("step-time", "gradients")
def _step_time(trial: Trial) -> Finding:
    side, half = trial.fitting(LIKE_IMAGENET), trial.fitting(LIKE_IMAGENET // 2)
    what = f"a training step of one image of {side}x{side}, in a batch of two, fp32, {threads()}"
    with trial.training():
        expected = _seconds(trial, half) * (side / half) ** 2
        if expected > LONGEST_STEP:
            return info(f"about {expected / 2:,.0f} s {what}; reckoned from {half}x{half}", expected / 2)
        seconds = _seconds(trial, side)
    return info(f"{seconds / 2:.2f} s {what}", seconds / 2)


def _seconds(trial: Trial, side: int) -> float:
    images = torch.randn(2, 3, side, side)
    clock = time.perf_counter()
    trial.train_step(images)
    return time.perf_counter() - clock
