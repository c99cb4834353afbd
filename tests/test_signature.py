"""Reading marked functions from source text: what is understood, what is refused, and that nothing runs."""

import inspect
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Interval

from vocseg.registry import KINDS, MARK, Component
from vocseg.signature import read_components


def read(text: str) -> list[Component]:
    return read_components(text.encode(), Path("plugins/net.py"), "plugins", lambda: None)


def one(text: str) -> Component:
    (found,) = read(text)
    return found


FULL = '''
"""A module."""
from typing import Annotated, Literal
from annotated_types import Interval
from vocseg import architecture

WIDTHS = (64, 128)
Depth = Annotated[int, Interval(ge=3, le=5)]

def helper(x, *args): ...

@architecture(backbone="encoder")
def linknet(
    num_classes: int,
    *,
    encoder: Literal["resnet18", "resnet34"] = "resnet34",
    depth: Depth = 5,
    widths: tuple[int, ...] = WIDTHS,
    p: float | None = None,
    shift: float = -1.5,
    size: int,
):
    """LinkNet (arXiv:1707.03718).

    More.
    """
'''


def test_a_marked_function_is_read_whole() -> None:
    net = one(FULL)
    assert (net.kind, net.name, net.summary) == ("architecture", "linknet", "LinkNet (arXiv:1707.03718).")
    assert net.doc == "LinkNet (arXiv:1707.03718).\n\nMore."
    assert (net.source, net.origin, net.backbone) == ("plugins/net.py:13", "plugins", "encoder")
    assert net.handed_over == ("num_classes",)
    assert [(p.name, p.annotation, p.default) for p in net.parameters] == [
        ("encoder", Literal["resnet18", "resnet34"], "resnet34"),
        ("depth", Annotated[int, Interval(ge=3, le=5)], 5),
        ("widths", tuple[int, ...], (64, 128)),
        ("p", float | None, None),
        ("shift", float, -1.5),
        ("size", int, ...),
    ]
    assert [p.name for p in net.parameters if p.required] == ["size"]


@pytest.mark.parametrize(
    ("imported", "decorator"),
    [
        ("from vocseg import loss", "loss"),
        ("from vocseg import loss", "loss()"),
        ("from vocseg import loss as term", "term"),
        ("from vocseg import *", "loss"),
        ("import vocseg", "vocseg.loss"),
        ("import vocseg as v", "v.loss"),
        ("import vocseg.registry", "vocseg.registry.loss"),
        ("import vocseg.registry as r", "r.loss"),
        ("from vocseg import registry", "registry.loss"),
        ("from vocseg.registry import loss", "loss"),
        ("try:\n    from vocseg import loss\nexcept ImportError: pass", "loss"),
    ],
)
def test_a_mark_is_known_however_it_is_imported(imported: str, decorator: str) -> None:
    text = f"{imported}\n@{decorator}\ndef mine(): ..."
    assert [c.kind for c in read(text)] == ["loss"]
    module: dict[str, Any] = {}
    exec(text, module)  # and Python reads it in the same way
    assert getattr(module["mine"], MARK).kind == "loss"


@pytest.mark.parametrize(
    "text",
    [
        "from torch import loss\n@loss\ndef mine(): ...",
        "from .vocseg import loss\n@loss\ndef mine(): ...",
        "from vocseg import loss\n@loss.other\ndef mine(): ...",
        "from vocseg import loss\ndef mine(): ...",
        "import vocseg\n@vocseg.__version__\ndef mine(): ...",
    ],
)
def test_what_is_not_marked_is_no_component(text: str) -> None:
    assert read(text) == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read(kind: str) -> None:
    assert one(f"from vocseg import {kind}\n@{kind}\ndef mine(): ...").kind == kind


@pytest.mark.parametrize(
    ("annotation", "default", "imports"),
    [
        ("Literal['a', 'b']", "'a'", "from typing import Literal"),
        ("t.Literal['a', 1]", "1", "import typing as t"),
        ("typing.Annotated[float, at.Ge(0)]", "0.5", "import typing\nimport annotated_types as at"),
        ("A[int, Interval(ge=1, le=9)]", "2", "from typing import Annotated as A\nfrom annotated_types import *"),
        ("Optional[Union[int, str]]", "None", "from typing import Optional, Union"),
        ("'int | None'", "None", ""),
        ("'Literal[\"a\"]'", "'a'", "from typing import Literal"),
        ("list[dict[str, Any]]", "[{'a': 1}]", "from typing import Any"),
        ("tuple[float, float]", "(0.5, +2.0)", ""),
        ("Path", "...", "from pathlib import Path"),
        ("Gt0", "N", "from typing import *\nfrom annotated_types import *\nN: int = 9\nGt0 = Annotated[int, Gt(0)]"),
        ("int", "SIZE", "SIZE = 3\ndef other():\n    SIZE = 4"),
        ("bool", "NOTHING", "NOTHING = None"),
    ],
)  # fmt: skip
def test_annotations_and_defaults_are_what_python_makes_of_them(annotation: str, default: str, imports: str) -> None:
    text = f"{imports}\nfrom vocseg import augmentation\n@augmentation\ndef mine(*, x: {annotation} = {default}): ..."
    module = ModuleType("plugin")
    exec(text, module.__dict__)
    expected = inspect.signature(module.mine, eval_str=True).parameters["x"]
    (found,) = one(text).parameters
    assert found.annotation == expected.annotation
    assert found.default == expected.default


def test_pydantics_field_is_understood() -> None:
    text = (
        "from typing import Annotated\nfrom pydantic import Field\nfrom vocseg import loss\n"
        "@loss\ndef mine(*, x: Annotated[int, Field(ge=1)] = 3): ..."
    )
    (parameter,) = one(text).parameters
    assert parameter.annotation.__metadata__[0].metadata[0].ge == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("*, x", "parameter 'x' without an annotation"),
        ("*, x: Tensor", "'Tensor' is unknown"),
        ("*, x: np.ndarray", "'np.ndarray' is unknown"),
        ("*, x: int.__class__", "'int.__class__' is unknown"),
        ("*, x: Ge(1)", "'Ge' may not be called"),
        ("*, x: int = f()", "'f' may not be called"),
        ("*, x: int = int()", "'int' may not be called"),
        ("*, x: int = 2**9", "is not allowed"),
        ("*, x: int = [i for i in ()]", "is not allowed"),
        ("*, x: str = f'{1}'", "is not allowed"),
        ("*, x: int = (lambda: 1)()", "may not be called"),
        ("*, x: 'int |'", "invalid syntax"),
        ("*, x: tuple[int, 3] | 5", "unsupported operand"),
        ("*, x: int = TWICE", "'TWICE' is unknown"),
        ("*, x: int = LATE", "'LATE' is unknown"),
        ("x", "takes 'x' by position, where only num_classes is handed over; put a * before the recipe's keys"),
        ("num_classes, x, /", "takes 'x' by position"),
        ("num_classes, *sizes", "must not take *args or **kwargs"),
        ("num_classes, **more", "must not take *args or **kwargs"),
        ("*, num_classes: int", "takes 'num_classes' by keyword, and vocseg hands it over; put it before the *"),
        ("*, weights: str = 'x'", "parameter 'weights', a key that vocseg reads itself; rename it"),
        ("*, name: str", "parameter 'name', a key that vocseg reads itself; rename it"),
    ],
)
def test_a_signature_that_breaks_the_contract_is_refused_with_its_place(arguments: str, reason: str) -> None:
    text = (
        "from vocseg import architecture\nfrom mine import Ge, np, Tensor\nTWICE = 1\nTWICE = 2\n"
        f"@architecture\ndef net({arguments}): ...\nLATE = len('ab')"
    )
    with pytest.raises(ValueError, match=r"^line 6: architecture 'net' ") as caught:
        read(text)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("@architecture\nclass Net: ...", "must be a plain function at the top level"),
        ("@architecture\nasync def net(num_classes): ...", "must be a plain function at the top level"),
        ("if True:\n    @architecture\n    def net(num_classes): ...", "must be a plain function at the top level"),
        ("class A:\n    @architecture\n    def net(num_classes): ...", "must be a plain function at the top level"),
        ("@architecture\n@loss\ndef net(num_classes): ...", "has two marks"),
        ("@architecture('encoder')\ndef net(num_classes): ...", "takes no ''encoder'' by position"),
        ("@architecture(backbon='encoder')\ndef net(num_classes): ...", "takes no 'backbon='encoder''"),
        ("@architecture(**{'backbone': 'x'})\ndef net(num_classes): ...", "its mark takes no"),
        ("@architecture(backbone=3)\ndef net(num_classes): ...", "'backbone' of its mark must be text"),
        ("@architecture(backbone=len('x'))\ndef net(num_classes): ...", "cannot be read"),
        ("@loss(backbone='x')\ndef net(num_classes): ...", "its mark takes no"),
    ],
)
def test_a_mark_in_the_wrong_place_or_with_wrong_options_is_refused(code: str, reason: str) -> None:
    with pytest.raises(ValueError, match=r"^line [2-4]: ") as caught:
        read(f"from vocseg import architecture, loss\n{code}")
    assert reason in str(caught.value)


def test_other_decorators_are_let_be() -> None:
    text = (
        "import functools\nfrom vocseg import loss\n@loss\n@functools.cache\n@f(1)[2]\ndef mine(*, p: float = 1): ..."
    )
    assert one(text).name == "mine"


def test_a_constant_may_name_the_encoder() -> None:
    text = "import vocseg\nBODY = 'body'\n@vocseg.architecture(backbone=BODY)\ndef net(num_classes): ..."
    assert one(text).backbone == "body"


def test_reading_warns_of_nothing_and_runs_nothing(tmp_path: Path) -> None:
    made = tmp_path / "made"
    text = (
        f"from vocseg import loss\nopen({str(made)!r}, 'w')\nimport no_such_package\nX = exit()\n"
        '@loss\ndef mine(*, p: float = 1):\n    "An invalid escape: \\d"\nraise SystemExit'
    )
    assert one(text).summary == r"An invalid escape: \d"
    assert not made.exists()


def test_coding_cookies_and_byte_order_marks_are_heeded() -> None:
    text = 'from vocseg import loss\n@loss\ndef mine():\n    "Lovász."\n'
    for encoded in (text.encode("utf-8-sig"), b"# coding: latin-1\n" + text.encode("latin-1")):
        (found,) = read_components(encoded, Path("a.py"), "", lambda: None)
        assert found.summary == "Lovász."
