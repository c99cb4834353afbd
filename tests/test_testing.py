"""The conformance kit: it passes what keeps the contract, and each way to break it fails on its own row."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pytest
import torch
from annotated_types import Ge, Interval
from torch import nn

from vocseg import architecture
from vocseg.errors import UsageError
from vocseg.plugins import PACKAGE, discover, import_file
from vocseg.registry import Component
from vocseg.testing import CHECK_NAMES, Report, Row, check_architecture
from vocseg.testing.subject import beyond_bounds

SLOW = ("export", "compile", "step-time")

GOOD = '''
import random
import urllib.request
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval, MaxLen
from torch import nn

from vocseg import architecture


class Net(nn.Module):
    stride = 4

    def __init__(self, num_classes, width):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, width, 3, 4, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x):
        y = self.encoder(x)
        y = F.interpolate(self.head(y), scale_factor=4.0, mode="bilinear")
        return y


@architecture(backbone="encoder")
def net(num_classes: int, *, width: Annotated[int, Interval(ge=4, le=64)] = 8) -> nn.Module:
    """A small network."""
    return Net(num_classes, width)
'''

# Places in the source above.
STRIDE = "    stride = 4\n"
INIT = "        self.head = nn.Conv2d(width, num_classes, 1)\n"
START = "        y = self.encoder(x)\n"
END = "        return y\n"
MARK = '@architecture(backbone="encoder")\n'
DEF = "def net(num_classes: int, *, width: Annotated[int, Interval(ge=4, le=64)] = 8) -> nn.Module:\n"
BUILD = "    return Net(num_classes, width)\n"


def change(*changes: tuple[str, str]) -> str:
    """The good source with texts replaced, each of which stands there once."""
    source = GOOD
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def init(line: str) -> tuple[str, str]:
    return INIT, f"{INIT}        {line}\n"


def first(line: str) -> tuple[str, str]:
    """A line more at the start of forward, which is given x."""
    return START, f"        {line}\n{START}"


def then(line: str) -> tuple[str, str]:
    """A line more in forward, where y are the features: (b, width, h / 4, w / 4)."""
    return START, f"{START}        {line}\n"


def last(line: str) -> tuple[str, str]:
    """A line more at the end of forward, where y are the logits."""
    return END, f"        {line}\n{END}"


def build(line: str) -> tuple[str, str]:
    """A line more in the builder, where n is the network."""
    return BUILD, f"    n = Net(num_classes, width)\n    {line}\n    return n\n"


# What is broken: the source, the rows that fail, and a part of what the first of them says.
BROKEN = {
    "a fixed number of classes": (
        change((INIT, INIT.replace("num_classes", "20"))),
        "classes",
        "for 151 classes: 20 channels",
    ),
    "never one class": (
        change((INIT, INIT.replace("num_classes", "max(num_classes, 2)"))),
        "classes",
        "for 1 class: 2 channels",
    ),
    "one class refused": (
        change(build("assert num_classes > 1")),
        "classes",
        "for 1 class: AssertionError (net.py:32)",
    ),
    "logits of three quarters of the size": (
        change(("scale_factor=4.0", "scale_factor=3.0")),
        "output",
        "images of 36x72 give logits of 27x54; return them at the images' size, or at the same whole fraction",
    ),
    "logits that are square for images that are not": (
        change(last("y = y[..., : y.shape[2]]")),
        "output",
        "images of 36x72 give logits of 36x36; return them",
    ),
    "an eighth of the size, rounded up": (
        change((STRIDE, "    stride = 1\n"), ("width, 3, 4, 1)", "width, 3, 8, 1)"), last("y = y[..., ::4, ::4]")),
        "stride",
        "the stride is 1, but images of 33x33 give logits of 5x5; set stride = 8",
    ),
    "a third of the size, which the stride is no multiple of": (
        change(last("y = y[..., ::3, ::3]")),
        "stride",
        "the stride is 4, but images of 36x36 give logits of 12x12; set stride = 12",
    ),
    "a tuple": (change((END, "        return y, y\n")), "output", "returned a tuple"),
    "a mapping without out": (
        change((END, '        return {"logits": y}\n')),
        "output",
        "a mapping with ['logits'], and no 'out'",
    ),
    "half precision": (change(last("y = y.half()")), "output", "torch.float16"),
    "class ids": (change(last("y = y.argmax(1)")), "forward", "torch.int64 of shape (2, 36, 72)"),
    "auxiliary logits of three classes": (
        change((END, '        return {"out": y, "aux": y[:, :3]}\n')),
        "auxiliary",
        "'aux' is (2, 3, 36, 72) float32",
    ),
    "square images only": (
        change(first("assert x.shape[2] == x.shape[3]")),
        "sizes",
        "images of 36x72 fail with AssertionError (net.py:23)",
    ),
    "a stride below the real one": (
        change((STRIDE, "    stride = 2\n")),
        "stride",
        "the stride is 2, but images of 34x34 give logits of 36x36; set stride = 4",
    ),
    "a stride that is a pair": (change((STRIDE, "    stride = (4, 4)\n")), "stride", "'stride' is (4, 4)"),
    "the image changed in place": (change(first("x.mul_(0.5)")), "input", "forward changes the images"),
    "the image not used": (change(last("y = 0 * y + self.head.bias[:, None, None]")), "image", "the same logits"),
    "an unused layer": (
        change(init("self.spare = nn.Linear(3, 3)")),
        "gradients",
        "2 of 8 parameters get none: spare.weight",
    ),
    "a detached branch": (
        change(init("self.branch = nn.Conv2d(3, width, 1)"), then("y = y + self.branch(x[..., ::4, ::4]).detach()")),
        "gradients",
        "2 of 8 parameters get none: branch.weight, branch.bias",
    ),
    "an encoder cut off": (change(then("y = y.detach()")), "gradients", "4 of 6 parameters get none: encoder.0.weight"),
    "a gradient that is infinite": (change(last("y = y + (0 * y).sqrt()")), "gradients bf16", "not finite"),
    "dropout in eval mode": (change(last("y = F.dropout(y, 0.5)")), "deterministic", "the second time"),
    "batch statistics in eval mode": (
        change(("nn.BatchNorm2d(width)", "nn.BatchNorm2d(width, track_running_stats=False)")),
        "neighbours",
        "an image alone gives logits that differ",
    ),
    "images that see each other": (
        change(last("y = y - 0.5 * y.mean(0, keepdim=True)")),
        "neighbours",
        "an image alone gives logits that differ",
    ),
    "a batch of one squeezed": (change(last("y = y.squeeze(0)")), "batch-1-eval", "one image gives logits for 21"),
    "a view that takes contiguous memory": (
        change(then("y = y.view(len(y), -1).view(y.shape)")),
        "channels-last",
        "view size is not compatible",
    ),
    "strides taken for granted": (
        change(then("y = torch.as_strided(y, y.shape, torch.empty(y.shape).stride())")),
        "channels-last",
        "images in channels_last give logits that differ",
    ),
    "layers in a plain list": (
        change(init("self.mix = [nn.Conv2d(width, width, 1)]"), then("y = y + self.mix[0](y)")),
        "round-trip",
        "a fresh build with this state dict gives logits that differ",
    ),
    "a layer made by forward": (
        change(first("self.late = getattr(self, 'late', nn.Conv2d(3, 3, 1))"), then("y = y + self.late(x).mean()")),
        "state round-trip",
        "parameters that only forward makes: late.bias, late.weight",
    ),
    "a counter in eval mode": (
        change(init('self.register_buffer("calls", torch.zeros(()))'), then("self.calls += 1")),
        "state",
        "forward in eval mode changes calls",
    ),
    "a lazy layer": (change(init("self.head = nn.LazyConv2d(num_classes, 1)")), "weights", "no size yet: head.weight"),
    "double precision": (change(build("n.double()")), "weights", "encoder.0.weight is torch.float64"),
    "weights that are not numbers": (
        change(build("n.head.bias.data.fill_(float('nan'))")),
        "weights",
        "not finite: head.bias",
    ),
    "weights from another generator": (
        change(build("n.head.bias.data.fill_(random.random())")),
        "seed",
        "differ in head.bias",
    ),
    "built in eval mode": (change(build("n.eval()")), "training-mode", "in eval mode after building: the network"),
    "the root of a negative number": (change(last("y = y + (-1 - y * y).sqrt()")), "fp32", "100.0% of the logits"),
    "a difference lost in bf16": (
        change(then("y = y + 1e-6 / (1 + 1e-3 * torch.ones_like(y) - 1)")),
        "bf16",
        "not finite under bf16 autocast",
    ),
    "a sum of two precisions": (
        change(then("y = torch.zeros(y.shape).index_add(0, torch.arange(len(y)), y)")),
        "bf16",
        "RuntimeError",
    ),
    "no such encoder": (
        change((MARK, '@architecture(backbone="body")\n')),
        "encoder",
        "has no such submodule; name one of its submodules: encoder, head",
    ),
    "nothing but the encoder": (
        change(build("n, n.encoder = nn.Sequential(), n; n = nn.Sequential(); n.encoder = Net(num_classes, width)")),
        "encoder",
        "'encoder' has all parameters",
    ),
    "a frozen encoder that goes on counting": (
        change(
            then(
                "conv, norm, relu = self.encoder; y = relu(F.batch_norm("
                "conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training))"
            ),
            ("        y = self.encoder(x)\n", ""),
        ),
        "freezing",
        "forward changes 1.running_mean, 1.running_var",
    ),
    "an encoder that thaws itself": (
        change(first("self.encoder.requires_grad_(True)")),
        "freezing",
        "frozen, but gets gradients: encoder.0.weight",
    ),
    "torch seeded": (change(build("torch.manual_seed(0)")), "global-state", "random seed from 20011 to 0"),
    "torch seeded by forward": (change(first("torch.manual_seed(7)")), "global-state", "running the network sets"),
    "threads set on import": (
        change(("\nclass Net", "torch.set_num_threads(torch.get_num_threads() + 1)\n\n\nclass Net")),
        "global-state",
        "importing the file sets torch's number of threads",
    ),
    "weights fetched": (
        change(build("urllib.request.urlopen('http://weights.example.org/net.pt')")),
        "offline",
        "it tried to connect to weights.example.org (net.py:32)",
    ),
    "an error in the builder": (change(build("raise KeyError(width)")), "build", "KeyError: 8 (net.py:32)"),
    "an exit in the builder": (change(build("raise SystemExit('enough')")), "build", "SystemExit: enough (net.py:32)"),
    "no module": (change(build("n = n.forward")), "build", "the function returned method, not a torch module"),
    "an error in forward": (change(then("y = self.up(y)")), "forward", "no attribute 'up' (net.py:24)"),
    "a missing package": (
        change(("import random\n", "import no_such_package\n")),
        "file",
        "No module named 'no_such_package' (net.py:2)",
    ),
    "not Python": (
        change((BUILD, "    return Net(num_classes\n")),
        "signature file",
        "not Python: '(' was never closed",
    ),
    "a parameter without a type": (
        change((DEF, "def net(num_classes: int, *, width=8) -> nn.Module:\n")),
        "signature",
        "a parameter 'width' without an annotation",
    ),
    "a parameter by position": (
        change((DEF, "def net(num_classes: int, width: int = 8) -> nn.Module:\n")),
        "signature",
        "takes 'width' by position",
    ),
    "a default beyond its bounds": (
        change((DEF, DEF.replace("= 8", "= 2"))),
        "bounds",
        "the default of 'width' breaks its own type",
    ),
    "bounds that do not fit the type": (
        change((DEF, DEF.replace("Interval(ge=4, le=64)", "MaxLen(4)"))),
        "bounds",
        "'width' cannot be checked",
    ),
}


def write(folder: Path, source: str) -> Path:
    path = folder / "net.py"
    path.write_text(source)
    return path


def verdicts(rows: Iterable[Row], verdict: str) -> list[str]:
    return [row.name for row in rows if row.verdict == verdict]


def test_a_network_that_keeps_the_contract_passes_every_check(tmp_path: Path) -> None:
    report = check_architecture(write(tmp_path, GOOD))
    assert report.passed
    report.raise_if_failed()
    assert [row.name for row in report.rows] == list(CHECK_NAMES)
    assert verdicts(report.rows, "info") == ["auxiliary", "parameters", "flops", "memory", "step-time"]
    assert verdicts(report.rows, "warn") == verdicts(report.rows, "skip") == []
    assert {row.architecture for row in report.rows} == {"net"}
    # Convolution 3*8*9 + 8, norm 16, head 8*21 + 21 = 429; FLOPs at 224²: 2 * 56² * (27*8 + 8*21).
    values = {row.name: row.value for row in report.rows}
    assert values["parameters"] == 429
    assert values["flops"] == 2 * 56 * 56 * (27 * 8 + 8 * 21)


def test_at_least_fifteen_ways_to_break_the_contract_are_known() -> None:
    assert len(BROKEN) >= 45
    failing = {rows.split()[0] for _, rows, _ in BROKEN.values()}
    assert set(CHECK_NAMES) - failing == {"batch-1-train", *SLOW, "parameters", "flops", "memory"}  # which never fail


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_fails_on_its_own_row(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source, rows, message = BROKEN[what]
    threads = torch.get_num_threads()
    report = check_architecture(write(tmp_path, source), without=SLOW)
    assert [row.name for row in report.failures] == rows.split(), str(report)
    found = report.failures[0]
    assert message in f"{found.found}; {found.remedy}"
    assert all(row.remedy and "\n" not in row.found + row.remedy for row in report.failures)
    assert torch.get_num_threads() == threads
    assert torch.get_default_dtype() == torch.float32


# What limits the use of a network is a warning


WARNINGS = {
    "batch norm of one value": (
        change(
            init("self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(width))"),
            then("y = y + self.pool(y)"),
        ),
        "batch-1-train",
        "fails at batch 1 in training: batch norm finds one value a channel",
    ),
    "another failure at batch 1": (
        change(first("assert len(x) > 1 or not self.training")),
        "batch-1-train",
        "fails at batch 1 in training: AssertionError (net.py:23)",
    ),
    "a least size": (change(first("assert x.shape[2] > 64")), "stride", "36x36 fail with AssertionError (net.py:23)"),
    "a branch times zero": (
        change(init("self.spare = nn.Linear(3, 3)"), then("y = y + 0 * self.spare(x[:, :, 0, :3]).mean()")),
        "gradients",
        "exactly zero: spare.weight, spare.bias",
    ),
    "a part of the encoder that is not read": (
        change(then("y = self.encoder[2](self.encoder[0](x))"), ("        y = self.encoder(x)\n", "")),
        "gradients",
        "2 of the encoder's get none: encoder.1.weight, encoder.1.bias",
    ),
    "a parameter that does not learn": (
        change(init("self.head.bias.requires_grad_(False)")),
        "gradients",
        "parameters that ask for none: head.bias",
    ),
    "no docstring": (change(('    """A small network."""\n', "")), "signature", "no docstring"),
    "control flow on values": (
        change(then("y = y + 1 if y.mean().item() > 0 else y")),
        "export compile",
        "torch.export fails",
    ),
}


@pytest.mark.parametrize("what", WARNINGS)
def test_what_limits_the_use_of_a_network_is_a_warning(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source, rows, message = WARNINGS[what]
    report = check_architecture(write(tmp_path, source), without=() if "compile" in rows else SLOW)
    assert report.passed, str(report)
    report.raise_if_failed()
    warned = [row for row in report.rows if row.verdict == "warn"]
    assert [row.name for row in warned] == rows.split(), str(report)
    assert message in warned[0].found
    assert all(row.remedy for row in warned)
    assert capfd.readouterr() == ("", "")  # torch's compilers would fill the screen


# All that comes with vocseg

BUNDLED = [c for c in discover() if c.kind == "architecture" and c.origin == "bundled"]
SMP = {parameter.name: parameter for parameter in discover().get("architecture", "smp").parameters}
DECODERS = get_args(SMP["decoder"].annotation)
LIMITS = {  # what smp's decoders are warned of
    "DeepLabV3": "batch-1-train",  # a batch norm on a map that was pooled to one place
    "DeepLabV3Plus": "batch-1-train",
    "PAN": "batch-1-train",
    "UPerNet": "batch-1-train",
    "MAnet": "gradients",  # attention through one channel, whose ReLU may start closed
    "PSPNet": "gradients",  # the encoder's maps below 1/8 are not read
    "DPT": "gradients",  # nor is the vision transformer's own head
}


@pytest.mark.parametrize("component", BUNDLED, ids=[component.name for component in BUNDLED])
def test_every_bundled_architecture_keeps_the_contract(component: Component) -> None:
    assert len(BUNDLED) >= 5
    report = check_architecture(component, without=SLOW)
    report.raise_if_failed()
    assert verdicts(report.rows, "warn") == [], str(report)


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_smp_decoder_keeps_the_contract(decoder: str) -> None:
    assert len(DECODERS) == 12
    encoder = "tu-vit_tiny_patch16_224" if decoder == "DPT" else "tu-mobilenetv3_small_050"
    report = check_architecture("smp", without=SLOW, decoder=decoder, encoder=encoder)
    report.raise_if_failed()
    assert set(verdicts(report.rows, "warn")) <= {LIMITS.get(decoder)}, str(report)


@pytest.mark.parametrize("name", ["mini_unet", "fcn_maxpool"])
def test_bundled_architectures_can_be_exported_and_compiled(name: str) -> None:
    report = check_architecture(name, without=[name for name in CHECK_NAMES if name not in ("export", "compile")])
    assert verdicts(report.rows, "pass") == ["export", "compile"], str(report)


# Figures


def test_the_memory_is_what_autograd_keeps_of_a_real_step() -> None:
    report = check_architecture("mini_unet", without=[name for name in CHECK_NAMES if name != "memory"], width=4)
    (row,) = report.rows
    network = discover().get("architecture", "mini_unet").build({"num_classes": 21}, {"width": 4})
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    images = torch.randn(2, 3, 224, 224)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = network(images)
    own = {tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers(), images)}
    assert logits.requires_grad
    assert row.value == sum(size for pointer, size in kept.items() if pointer not in own) // 2


# What to check


def only(*names: str) -> list[str]:
    """What is to be left out for these checks alone."""
    return [name for name in CHECK_NAMES if name not in names]


def test_a_marked_function_is_checked_with_parameters(tmp_path: Path) -> None:
    function = import_file(write(tmp_path, GOOD)).net
    report = check_architecture(function, without=only("signature", "build", "parameters"), width=4)
    assert [row.verdict for row in report.rows] == ["pass", "pass", "info"]
    assert "width = 4" in report.rows[1].found
    assert report.rows[2].value == 4 * 27 + 4 + 8 + 4 * 21 + 21


def test_a_function_that_listing_cannot_find_is_told_so() -> None:
    @architecture
    def hidden(num_classes: int) -> nn.Module:
        """A network within a function."""
        return nn.Conv2d(3, num_classes, 1)

    report = check_architecture(hidden, without=only("signature", "bounds", "build"))
    assert [(row.name, row.verdict) for row in report.rows] == [
        ("signature", "fail"), ("bounds", "skip"), ("build", "pass"),
    ]  # fmt: skip
    assert "must be a plain function at the top level" in report.rows[0].found


def test_every_architecture_of_a_file_is_checked(tmp_path: Path) -> None:
    second = GOOD[GOOD.index(MARK) :].replace("def net", "def wide").replace("A small", "A wide")
    report = check_architecture(write(tmp_path, f"{GOOD}\n\n{second}"), without=only("build", "parameters"))
    assert [(row.architecture, row.name) for row in report.rows] == [
        ("net", "build"), ("net", "parameters"), ("wide", "build"), ("wide", "parameters"),
    ]  # fmt: skip
    assert str(report).splitlines()[0] == "net"
    assert "wide" in str(report).splitlines()


def test_one_wrong_signature_does_not_hide_the_other_checks(tmp_path: Path) -> None:
    source = change((DEF, "def net(num_classes, *, width=8):\n"))
    report = check_architecture(write(tmp_path, source), without=SLOW)
    assert verdicts(report.rows, "fail") == ["signature"]
    assert verdicts(report.rows, "skip") == ["bounds"]
    assert len(verdicts(report.rows, "pass")) >= 22


def test_a_file_of_a_package_is_imported_as_part_of_it(tmp_path: Path) -> None:
    package = tmp_path / "plugins" / "mine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('"""Mine."""\nfrom . import widths\n')
    (package / "widths.py").write_text("WIDTH = 8\n")
    path = write(package, GOOD.replace("import random\n", "from .widths import WIDTH\n"))
    assert check_architecture(path, without=only("file", "build")).passed


def test_a_name_that_is_taken_is_told(tmp_path: Path) -> None:
    (tmp_path / "plugins").mkdir()
    source = GOOD.replace("def net", "def mini_unet")
    report = check_architecture(write(tmp_path / "plugins", source), without=only("signature", "build"))
    assert [row.verdict for row in report.rows] == ["fail", "pass"]
    assert "architecture 'mini_unet' is defined at" in report.rows[0].found


def test_what_does_not_exist_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    for target, params, message in (
        (tmp_path / "nett.py", {}, "no such file; did you mean 'net.py'?"),
        ("mini_unett", {}, "did you mean 'mini_unet'?"),
        (write, {}, "write is not marked as an architecture; put @architecture above it"),
        (path, {"widht": 4}, "widht: architecture 'net' has no such parameter; did you mean 'width'?"),
        (path, {"width": 2}, "width: input should be greater than or equal to 4, found 2"),
        (path, {"width": "8"}, "width: input should be a valid integer, found '8'"),
        (path, {"without": ["shape"]}, "no check is named 'shape'"),
    ):
        with pytest.raises(UsageError) as raised:
            check_architecture(target, **params)
        assert message in str(raised.value)
    (tmp_path / "net.py").write_text("import vocseg\n")
    with pytest.raises(UsageError, match="holds no architecture; mark its function"):
        check_architecture(path)
    path.write_text(change((DEF, DEF.replace(" = 8", ""))))
    with pytest.raises(UsageError, match="width: architecture 'net' needs a value of it"):
        check_architecture(path)


@pytest.mark.parametrize(
    ("annotation", "values"),
    [
        (Annotated[int, Interval(ge=3, le=5)], [2, 6]),
        (Annotated[float, Interval(gt=0, lt=1)] | None, [0, 1]),
        (Annotated[int, Ge(1)] | str, []),  # 0 might be meant for the other
        (Literal["a", "b"], ["no such choice"]),
        (int, []),
    ],
)
def test_values_beyond_bounds_are_those_next_to_them(annotation: Any, values: list) -> None:
    assert list(beyond_bounds(annotation)) == values


# The report


def test_a_test_fails_with_every_failure_and_its_remedy(tmp_path: Path) -> None:
    source = change(init("self.spare = nn.Linear(3, 3)"), (STRIDE, "    stride = 2\n"))
    report = check_architecture(write(tmp_path, source), without=SLOW)
    with pytest.raises(AssertionError) as raised:
        report.raise_if_failed()
    assert str(raised.value).splitlines() == [
        "net fails 2 checks of 32:",
        "  stride: the stride is 2, but images of 34x34 give logits of 36x36; "
        "set stride = 4 on the module; sides of 36 work",
        "  gradients: 2 of 8 parameters get none: spare.weight, spare.bias; "
        "use it in forward without detach or no_grad, or delete it",
    ]


def test_the_report_is_a_table_with_remedies_and_what_was_not_tried() -> None:
    rows = (
        Row("net", "build", "pass", "Net for 21 classes"),
        Row("net", "encoder", "fail", "no such submodule", "name another"),
        Row("net", "freezing", "skip", "not tried, because encoder failed"),
    )
    assert str(Report(rows)).splitlines() == [
        "net",
        "  pass  build    Net for 21 classes",
        "  fail  encoder  no such submodule",
        "                 -> name another",
        "  not tried: freezing",
        "  1 passed, 0 warnings, 1 failed, 1 not tried",
    ]
    assert not Report(rows).passed
    assert Report(rows).failures == rows[1:2]


# What the kit leaves behind


def test_the_callers_random_numbers_go_on_as_if_nothing_had_been_checked(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    check_architecture(write(tmp_path, GOOD), without=SLOW)
    assert torch.equal(torch.rand(3), expected)
    assert torch.initial_seed() == 5


def test_connections_work_again_after_a_check(tmp_path: Path) -> None:
    before = socket.getaddrinfo, socket.socket.connect, socket.socket.connect_ex
    check_architecture(write(tmp_path, GOOD), without=only("offline"))
    assert (socket.getaddrinfo, socket.socket.connect, socket.socket.connect_ex) == before


def test_the_kit_needs_no_pytest() -> None:
    program = (
        "import sys; import vocseg.testing; "
        "print(sorted({'pytest', 'rich', 'click', 'torchvision', 'timm'} & sys.modules.keys()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"
