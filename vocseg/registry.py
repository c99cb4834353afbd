"""The kinds of component, the marks that plugins put on functions, and the registry that finds them.

A component is a plain function. What it takes by position is handed over by vocseg, by name; what it
takes by keyword is a recipe key. A mark only tags the function, so importing a plugin changes nothing.

    kind           handed over by position                  returns
    architecture   num_classes                              a module: (b, 3, h, w) -> (b, num_classes, h', w')
    loss           any of num_classes, class_pixels         f(logits, target) -> scalar tensor
    augmentation   nothing                                  f(sample, rng), which changes the sample in place
    optimizer      params                                   a torch.optim.Optimizer
    schedule       any of steps, steps_per_epoch, lr        f(step) -> factor on the learning rate
    initializer    nothing                                  f(module), which fills one layer's weights
    dataset        any of root, split                       a vocseg.data.dataset.Dataset
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from vocseg.errors import Problem, UsageError, did_you_mean, shorten, shown_path

HANDED_OVER: dict[str, tuple[str, ...]] = {
    "architecture": ("num_classes",),
    "loss": ("num_classes", "class_pixels"),
    "augmentation": (),
    "optimizer": ("params",),
    "schedule": ("steps", "steps_per_epoch", "lr"),
    "initializer": (),
    "dataset": ("root", "split"),
}
KINDS = tuple(HANDED_OVER)

RESERVED: dict[str, tuple[str, ...]] = {
    "architecture": ("name", "weights"),
    "loss": ("name", "weight"),
    "augmentation": ("name",),
    "optimizer": ("name", "encoder_lr"),
    "schedule": ("name", "warmup_epochs"),
    "initializer": ("name",),
    "dataset": (
        "name",
        "root",
        "train",
        "val",
        "batch_size",
        "repeat",
        "normalize",
        "workers",
        "augment_on",
        "cache",
        "on_bad_image",
        "timeout_seconds",
    ),
}
"""The keys that vocseg itself reads beside a component's own; `vocseg.recipe.schema` says what they mean."""

MARK = "__vocseg_mark__"


@dataclass(frozen=True)
class Mark:
    """What a decorator leaves on a function."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)


def _mark(function: Callable | None, kind: str, **options: Any) -> Callable:
    def tag(target: Callable) -> Callable:
        setattr(target, MARK, Mark(kind, options))
        return target

    return tag if function is None else tag(function)


def architecture(function: Callable | None = None, /, *, backbone: str = "") -> Callable:
    """Marks a function that builds a network.

    `backbone` names the attribute of the built module that holds its encoder. It is what `model.weights = "imagenet"`
    fills, `train.freeze_encoder` freezes and `optimizer.encoder_lr` slows down. Where a published file has other names
    or shapes than the module, a method `adapt_weights` of it puts them right (see `vocseg.data.weights`).
    """
    return _mark(function, "architecture", backbone=backbone)


def loss(function: Callable | None = None, /) -> Callable:
    """Marks a function that makes a loss: f(logits (b, c, h, w) float32, target (b, h, w) int64, void 255)."""
    return _mark(function, "loss")


def augmentation(function: Callable | None = None, /) -> Callable:
    """Marks a function that makes an augmentation: f(sample, rng) with a `vocseg.data.sample.Sample`."""
    return _mark(function, "augmentation")


def optimizer(function: Callable | None = None, /) -> Callable:
    """Marks a function that makes a torch optimizer from parameter groups."""
    return _mark(function, "optimizer")


def schedule(function: Callable | None = None, /) -> Callable:
    """Marks a function that makes a schedule: f(step from 0) -> factor on the learning rate."""
    return _mark(function, "schedule")


def initializer(function: Callable | None = None, /) -> Callable:
    """Marks a function that makes an initialiser: f(convolution or linear layer) fills its weights in place."""
    return _mark(function, "initializer")


def dataset(function: Callable | None = None, /) -> Callable:
    """Marks a function that opens one split of a data set."""
    return _mark(function, "dataset")


@dataclass(frozen=True)
class Parameter:
    """One recipe key of a component: a keyword-only parameter of its function."""

    name: str
    annotation: Any
    default: Any  # `...` where the recipe must give a value
    text: str  # the annotation as it is written

    @property
    def required(self) -> bool:
        return self.default is ...


@dataclass(frozen=True)
class Component:
    """A marked function, known from its source. Only `load` imports the file that holds it."""

    kind: str
    name: str
    doc: str
    file: str
    line: int
    origin: str  # "vocseg", "bundled", a distribution's name, or the plugin folder
    handed_over: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    options: dict[str, Any]
    importer: Callable[[], Any] = field(repr=False, compare=False)

    @property
    def summary(self) -> str:
        return self.doc.strip().split("\n", 1)[0]

    @property
    def source(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def backbone(self) -> str:
        return self.options.get("backbone", "")

    def load(self) -> Callable:
        """Imports the file and returns the marked function.

        Raises:
            UsageError: the import fails, or leaves no such marked function.
        """
        where = shown_path(self.source)
        try:
            function = getattr(self.importer(), self.name, None)
        except (Exception, SystemExit) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UsageError(Problem(where, f"{self.kind} '{self.name}' cannot be loaded: {reason}")) from error
        mark = getattr(function, MARK, None)
        if function is None or mark is None or mark.kind != self.kind:
            found = f"a function marked {mark.kind}" if mark else "no marked function"
            message = (
                f"{self.kind} '{self.name}' stands in the source, and once the file is imported that name is {found}"
            )
            raise UsageError(Problem(where, f"{message}; look for what replaces or wraps it further down"))
        return function

    def build(self, available: dict[str, Any], params: dict[str, Any]) -> Any:
        """Calls the function with what it asks for by position out of `available`, and `params` by keyword."""
        return self.load()(*(available[name] for name in self.handed_over), **params)


@dataclass(frozen=True)
class BrokenPlugin:
    """A file that could not be read as a plugin, and why."""

    file: str
    reason: str


class Registry:
    """All components that discovery found, by kind and name. A value that is passed on; never global.

    A name that two components of a kind have is neither's, so that none can take another's place unseen.
    """

    def __init__(self, components: Iterable[Component], broken: Iterable[BrokenPlugin] = ()):
        self.broken = tuple(broken)
        self._components: dict[tuple[str, str], Component] = {}
        self._clashes: dict[tuple[str, str], list[Component]] = {}
        for component in components:
            first = self._components.setdefault((component.kind, component.name), component)
            if first is not component:
                self._clashes.setdefault((component.kind, component.name), [first]).append(component)
        for clash in self._clashes:
            del self._components[clash]

    @property
    def clashes(self) -> list[Component]:
        """Those that have the name of one found before them; `missing` says where the others are."""
        return [component for _, *later in self._clashes.values() for component in later]

    def __iter__(self) -> Iterator[Component]:
        order = {kind: i for i, kind in enumerate(KINDS)}
        return iter(sorted(self._components.values(), key=lambda c: (order[c.kind], c.name)))

    def names(self, kind: str) -> list[str]:
        return [c.name for c in self if c.kind == kind]

    def find(self, kind: str, name: str) -> Component | None:
        return self._components.get((kind, name))

    def missing(self, kind: str, name: str) -> str:
        """What to tell a user who named a component that is not there, or is there twice.

        The nearest name follows, and any plugin that could not be read.
        """
        if clashing := self._clashes.get((kind, name)):
            places = " and at ".join(shown_path(component.source) for component in clashing)
            return f"{kind} '{name}' is defined at {places}; rename or delete all but one"
        message = f"no {kind} is named '{shorten(name)}'{did_you_mean(name, self.names(kind))}"
        for plugin in self.broken:
            message += f" (note: {shown_path(plugin.file)} could not be read: {plugin.reason})"
        return message

    def get(self, kind: str, name: str) -> Component:
        """The component of that kind and name.

        Raises:
            UsageError: there is none, or more than one; see `missing`.
        """
        component = self.find(kind, name)
        if component is None:
            raise UsageError(self.missing(kind, name))
        return component
