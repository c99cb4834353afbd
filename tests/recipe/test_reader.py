"""Reading recipes: what is refused, where each problem is said to be, strictness, defaults, and overrides."""

from pathlib import Path
from typing import Any

import pytest

from vocseg.errors import UsageError
from vocseg.plugins import bundled, discover
from vocseg.recipe.reader import Recipe, find_recipe, locate, read_recipe
from vocseg.registry import Registry

BASE = """\
description = "A test."
seed = 1

[model]
name = "fcn_baseline"

[data]
name = "synthetic"

[[augmentation]]
name = "crop"
size = 96

[[augmentation]]
name = "horizontal_flip"

[train]
epochs = 3
"""


@pytest.fixture(scope="module")
def registry() -> Registry:
    return discover()


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(registry: Registry, text: str | bytes, *overrides: str) -> Recipe:
    path = Path("x.toml")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_recipe(path, registry, overrides, look_for_weights=True)


def problems(registry: Registry, text: str | bytes, *overrides: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        read(registry, text, *overrides)
    assert caught.value.exit_code == 2
    return [str(problem) for problem in caught.value.problems]


# A whole recipe


def test_a_recipe_is_read_with_every_default_filled_in(registry: Registry) -> None:
    recipe = read(registry, BASE)
    assert (recipe.name, recipe.path, recipe.text) == ("x", Path("x.toml"), BASE.encode())
    assert (recipe.description, recipe.seed) == ("A test.", 1)
    assert (recipe.model.name, recipe.model.settings.weights) == ("fcn_baseline", "none")
    assert recipe.model.params == {"norm_order": "relu_bn"}
    assert (recipe.data.name, recipe.data.settings.batch_size) == ("synthetic", 8)
    assert [(a.name, a.params) for a in recipe.augmentations] == [
        ("crop", {"size": 96, "foreground": 0.0}),
        ("horizontal_flip", {"p": 0.5}),
    ]
    assert [(loss.name, loss.settings.weight) for loss in recipe.losses] == [("cross_entropy", 1.0)]
    assert [recipe.optimizer.name, recipe.schedule.name, recipe.initializer.name] == ["adamw", "constant", "none"]
    assert (recipe.train.epochs, recipe.train.minutes, recipe.evaluate.metric) == (3, None, "miou")
    assert recipe.early_stopping is None
    assert list(recipe.resolved) == [
        "description", "seed", "model", "data", "augmentation", "loss", "optimizer", "schedule", "initializer", "train",
        "evaluate",
    ]  # fmt: skip
    assert "minutes" not in recipe.resolved["train"]
    assert recipe.resolved["optimizer"]["betas"] == [0.9, 0.999]


def test_given_keys_are_told_from_defaults(registry: Registry) -> None:
    recipe = read(registry, BASE, "train.ema=0.99", "optimizer={name='sgd', lr=0.1}")
    assert recipe.given == {
        ("description",), ("seed",), ("model", "name"), ("data", "name"), ("augmentation", 0, "name"),
        ("augmentation", 0, "size"), ("augmentation", 1, "name"), ("train", "epochs"), ("train", "ema"),
        ("optimizer", "name"), ("optimizer", "lr"),
    }  # fmt: skip


def test_no_augmentation_is_a_choice(registry: Registry) -> None:
    assert read(registry, BASE, "augmentation=[]").augmentations == ()
    assert read(registry, BASE, "augmentation=[]").resolved["augmentation"] == []


# Every problem at once, each at its line


MISTAKES = """\
description = 3
seed = -1
epochs = 4

[model]
name = "fcn_baselin"
weight = "none"

[data]
name = "folder"
batchsize = 8
repeat = 1.5

[[augmentation]]
name = "crop"
siz = 96
foreground = 2

[[augmentation]]
nam = "horizontal_flip"
p = "often"

[[loss]]
name = "cross_entropy"
class_weights = "inverted"

[optimizer]
name = "adamw"
betas = [0.9]

[schedul]
name = "cosine"

[train]
ema = 2020-01-01
lr = 1e-3

[early_stopping]
patience = 0
"""


def test_every_problem_is_told_at_once_with_its_line_and_remedy(registry: Registry) -> None:
    sizes = "whole number from 1 to 8192 or array of 2 whole numbers from 1 to 8192"
    names = ", ".join(registry.names("augmentation"))
    assert len(sizes) < 80
    assert problems(registry, MISTAKES, "data.cache=of", "loss.1.weight=2") == [
        '--set data.cache=of: data.cache: expected "auto" or "off", or a folder written with a /, found "of"; '
        'did you mean "off"?',
        "--set loss.1.weight=2: 'loss' is an array of 1, counted from 0",
        "x.toml:1: description: expected text, found 3",
        "x.toml:2: seed: expected whole number ≥ 0 and < 4294967296, found -1",
        "x.toml:3: epochs: unknown key here; it belongs in [train]",
        "x.toml:6: model.name: no architecture is named 'fcn_baselin'; did you mean 'fcn_baseline'?",
        "x.toml:7: model.weight: unknown key; did you mean 'weights'?",
        "x.toml:9: data.classes: missing; expected array of 2 to 255 texts",
        "x.toml:11: data.batchsize: unknown key; did you mean 'batch_size'?",
        "x.toml:12: data.repeat: expected whole number ≥ 1, found 1.5",
        "x.toml:16: augmentation.0.siz: unknown key; did you mean 'size'?",
        "x.toml:17: augmentation.0.foreground: expected number from 0 to 1, found 2",
        f"x.toml:19: augmentation.1.name: missing; known: {names}",
        "x.toml:20: augmentation.1.nam: unknown key; did you mean 'name'?",
        'x.toml:25: loss.0.class_weights: expected "none", "inverse", "log" or "median", or array of numbers ≥ 0, '
        'found "inverted"; did you mean "inverse"?',
        "x.toml:29: optimizer.betas: expected array of 2 numbers ≥ 0 and < 1, found [0.9]",
        "x.toml:31: schedul: unknown key or table; did you mean 'schedule'?",
        "x.toml:34: train.epochs: missing; expected whole number ≥ 1",
        "x.toml:35: train.ema: 2020-01-01 is a date or time, which no recipe key takes; quote it if it is text",
        "x.toml:36: train.lr: unknown key here; it belongs in [optimizer]",
        "x.toml:39: early_stopping.patience: expected whole number ≥ 1, found 0",
    ]


def test_an_empty_recipe_lacks_three_tables(registry: Registry) -> None:
    architectures, datasets = (", ".join(registry.names(kind)) for kind in ("architecture", "dataset"))
    assert problems(registry, "") == [
        f'x.toml: model: missing; add [model] with name = "…"; known: {architectures}',
        f'x.toml: data: missing; add [data] with name = "…"; known: {datasets}',
        "x.toml: train: missing; add [train]",
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("model = 3", "x.toml:1: model: expected a table, found 3; write [model]"),
        ("[[model]]", "x.toml:1: model: expected a table, found [{}]; write [model]"),
        ("[train]\nepochs = 1\n[[train.x]]", "x.toml:3: train.x: unknown key; known: accumulate"),
        ("[loss]\nname = 'dice'", 'x.toml:1: loss: expected an array of tables, found {name = "dice"}; write [[loss]]'),
        ("loss = [3]", "x.toml:1: loss.0: expected a table, found 3; write [[loss]]"),
        ("loss = []", "x.toml:1: loss: expected at least one; leave loss out for 'cross_entropy'"),
        ("train = 'x'", 'x.toml:1: train: expected a table, found "x"; write [train]'),
        ("[model]\nname = 3", "x.toml:2: model.name: expected text, found 3; known: "),
        ("[model]\nname = ''", "x.toml:2: model.name: no architecture is named ''"),
        ("model = {name = 'fcn_baseline', x = 1}", "x.toml:1: model.x: unknown key; known: name, norm_order, weights"),
        ("[optimizer]\nlr = 1e-3", "x.toml:1: optimizer.name: missing; known: adam"),
        ("[optimizer]\nname = 'adam'\nepochs = 2", "x.toml:3: optimizer.epochs: unknown key here; it belongs in "),
        ("[train]\nweight = 2", "x.toml:2: train.weight: unknown key here; it belongs in [[loss]]"),
        ("[train]\nmomentum = 0.9", "x.toml:2: train.momentum: unknown key; known: "),
        ("optimizer = {name = 'sgd'}\ntrain = {momentum = 0.9}", "unknown key here; it belongs in [optimizer]"),
        ("[evaluate]\nmetric = 'mIoU'", '"val_loss" or "last", found "mIoU"; did you mean "miou"?'),
        ("description = '''\n[x]'''\nseed = ''", 'x.toml:3: seed: expected whole number ≥ 0 and < 4294967296'),
        (f"seed = '{'x' * 1000}'", f'found "{"x" * 56}...'),
    ],
)  # fmt: skip
def test_a_wrong_table_or_key_is_told(registry: Registry, text: str, found: str) -> None:
    assert any(found in problem for problem in problems(registry, text))


def test_a_foreign_value_is_told_once_wherever_it_stands(registry: Registry) -> None:
    text = f"{BASE}[optimizer]\nname = 'adam'\nbetas = [0.9, nan]\neps = inf\n"
    assert problems(registry, text) == [
        "x.toml:21: optimizer.betas.1: expected a finite number, found nan",
        "x.toml:22: optimizer.eps: expected a finite number, found inf",
    ]
    assert problems(registry, BASE.replace("epochs = 3", "minutes = 12:00:00\nclip = 0x8000000000000000"))[1:] == [
        "x.toml:18: train.minutes: 12:00:00 is a date or time, which no recipe key takes; quote it if it is text",
        "x.toml:19: train.clip: expected a whole number of at most 64 bits, found a larger one",
    ]


def test_what_is_not_toml_is_told_with_its_line(registry: Registry) -> None:
    assert problems(registry, "seed = 1\nseed") == ["x.toml:2: not TOML: expected '=' after a key in a key/value pair"]
    assert problems(registry, b"\xff") == ["x.toml:1: not UTF-8 text; save the recipe as UTF-8"]
    assert problems(registry, "#" * 100_000) == ["x.toml: expected a recipe of at most 65,536 bytes, found more"]


def test_a_byte_order_mark_is_no_part_of_the_first_key(registry: Registry) -> None:
    marked = b"\xef\xbb\xbf" + BASE.encode()
    assert read(registry, marked).resolved == read(registry, BASE).resolved
    assert problems(registry, b"\xef\xbb\xbfsead = 1\n" + BASE.encode()) == [
        "x.toml:1: sead: unknown key or table; did you mean 'seed'?"
    ]


def test_a_recipe_that_cannot_be_opened_is_told(registry: Registry) -> None:
    with pytest.raises(UsageError, match=r"gone\.toml: cannot be read: No such file"):
        read_recipe(Path("gone.toml"), registry)


def test_a_plugin_that_could_not_be_read_is_told_with_the_name_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "net.py").write_text("import vocseg\ndef net(:")
    (problem,) = problems(discover(project=tmp_path), BASE.replace("fcn_baseline", "net"))
    assert "no architecture is named 'net'" in problem
    assert "net.py could not be read: line 2: not Python" in problem


# Strictness


@pytest.mark.parametrize(
    ("override", "fine"),
    [
        ("train.epochs=3", True),
        ('train.epochs="3"', False),
        ("train.epochs=3.0", False),
        ("train.epochs=true", False),
        ("train.epochs=0", False),
        ("train.epochs=[3]", False),
        ("train.clip=1", True),  # a whole number is a number
        ("train.clip=1.5", True),
        ("train.clip=0", False),
        ('train.clip="1"', False),
        ("train.clip=true", False),
        ("train.compile=true", True),
        ("train.compile=1", False),
        ("train.compile=True", False),
        ("train.precision=bf16", True),
        ("train.precision=BF16", False),
        ("optimizer={name='adam', betas=[0, 0.5]}", True),
        ("optimizer={name='adam', betas=[0, 0.5, 0.5]}", False),
        ("optimizer={name='adam', betas=[0, 1]}", False),
        ("optimizer={name='adam', betas=0.5}", False),
        ("augmentation.0.size=[96, 64]", True),
        ("augmentation.0.size=[96, 64.0]", False),
        ("loss=[{name='cross_entropy', class_weights=[1, 2.5]}]", True),
        ("loss=[{name='cross_entropy', class_weights='log'}]", True),
        ("loss=[{name='cross_entropy', class_weights=['log']}]", False),
        ("description=[]", False),
    ],
)
def test_types_are_strict(registry: Registry, override: str, fine: bool) -> None:
    if fine:
        read(registry, BASE, override)
    else:
        (problem,) = problems(registry, BASE, override)
        assert problem.startswith(f"--set {override}: ")
        assert "expected " in problem


def test_values_have_the_type_of_their_key(registry: Registry) -> None:
    recipe = read(
        registry, BASE, "train.clip=1", "optimizer={name='adam', betas=[0, 0.5]}", "augmentation.0.size=[9, 8]"
    )
    assert isinstance(recipe.train.clip, float)
    assert recipe.optimizer.params["betas"] == (0.0, 0.5)
    assert recipe.augmentations[0].params["size"] == (9, 8)


# What only shows when several keys are seen together


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (["model.weights=imagenet"], 'model.weights: "imagenet" is for an encoder, and '),
        (["train.freeze_encoder=true"], "train.freeze_encoder: 'fcn_baseline' has no encoder that is set apart"),
        (["optimizer={name='adam', encoder_lr=0.1}"], "optimizer.encoder_lr: 'fcn_baseline' has no encoder"),
        (["model.name=smp", "train.unfreeze_after=2"], "train.unfreeze_after: has no effect without train.freeze"),
        (["evaluate.overlap=0.25"], "evaluate.overlap: has no effect without evaluate.window"),
        (
            ["model.name=smp", "train.freeze_encoder=true", "train.unfreeze_after=3"],
            "train.unfreeze_after: expected less than train.epochs = 3, found 3",
        ),
        (
            ["schedule={name='cosine', warmup_epochs=3}"],
            "schedule.warmup_epochs: expected less than train.epochs = 3, found 3",
        ),
        (["early_stopping.patience=2", "data.val=train"], "data.val: early stopping needs another split"),
        (
            ["model.weights=no.pth"],
            'model.weights: expected "none", "imagenet", "published" or a file, and there is no file ',
        ),
        (["model.weights=imagnet"], "imagnet; did you mean 'imagenet'?"),
    ],
)  # fmt: skip
def test_keys_that_contradict_each_other_are_told(registry: Registry, overrides: list[str], found: str) -> None:
    told = problems(registry, BASE, *overrides)
    assert len(told) == 1
    assert found in told[0]


def test_contradictions_are_told_together_with_other_problems(registry: Registry) -> None:
    told = problems(registry, BASE, "sead=3", "model.weights=imagenet", "schedule={name='cosine', warmup_epochs=9}")
    assert len(told) == 3


def test_weights_need_not_be_there_when_a_run_folder_is_read_again(registry: Registry) -> None:
    Path("x.toml").write_text(BASE)
    recipe = read_recipe(Path("x.toml"), registry, ["model.weights=gone.pth"])
    assert recipe.model.settings.weights == "gone.pth"


# Overrides


@pytest.mark.parametrize("override", ["model.weights=none", 'model.weights="none"', "model.weights='none'"])
def test_text_may_be_given_with_and_without_quotes(registry: Registry, override: str) -> None:
    assert read(registry, BASE, override).model.settings.weights == "none"


def test_later_overrides_win_and_see_earlier_ones(registry: Registry) -> None:
    recipe = read(registry, BASE, "train.epochs=4", "train.epochs=5", "loss=[{name='dice'}]", "loss.0.weight=2")
    assert recipe.train.epochs == 5
    assert [(part.name, part.settings.weight) for part in recipe.losses] == [("dice", 2.0)]


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("train.epocs=3", "--set train.epocs=3"),  # the key itself
        ("train={epocs=3}", "--set train={epocs=3}"),  # within the table that was set
        ("schedule.power=2", "--set schedule.power=2"),  # a table that is there only because of the flag
        ("augmentation.1.name=crop", "x.toml:14"),  # crop's size is missing from the recipe's own table
    ],
)
def test_a_problem_is_located_at_the_flag_that_caused_it(registry: Registry, override: str, where: str) -> None:
    assert {problem.rpartition(": ")[0].split(": ")[0] for problem in problems(registry, BASE, override)} == {where}


# Plugins of others


def with_plugin(folder: Path, signature: str) -> Registry:
    (folder / "plugins").mkdir()
    (folder / "plugins" / "net.py").write_text(
        "from typing import Annotated\nfrom annotated_types import Ge, Len\nfrom pathlib import Path\n"
        f"from vocseg import architecture\n@architecture\ndef net(num_classes, *, {signature}): ..."
    )
    return discover(project=folder)


NET = BASE.replace("fcn_baseline", "net")


def test_a_parameter_may_have_any_name_python_allows(tmp_path: Path) -> None:
    names = ["copy", "json", "schema", "model_config", "model_fields", "model_dump", "_hidden", "lr", "größe"]
    registry = with_plugin(tmp_path, ", ".join(f"{name}: int = {i}" for i, name in enumerate(names)))
    recipe = read(registry, NET, "model.copy=7", "model.model_config=8")
    expected: dict[str, Any] = {name: i for i, name in enumerate(names)} | {"copy": 7, "model_config": 8}
    assert recipe.model.params == expected
    assert set(problems(registry, NET, "model.schemer=1", "model.copy=x")) == {
        "--set model.schemer=1: model.schemer: unknown key; did you mean 'schema'?",
        '--set model.copy=x: model.copy: expected whole number, found "x"',
    }


def test_defaults_are_checked_and_read_as_the_recipe_would_be(tmp_path: Path) -> None:
    registry = with_plugin(
        tmp_path, "a: float = 1, b: tuple[float, ...] = [1, 2], c: Path = 'x//y', d: int | None = None"
    )
    recipe = read(registry, NET)
    assert recipe.model.params == {"a": 1.0, "b": (1.0, 2.0), "c": Path("x/y"), "d": None}
    assert isinstance(recipe.model.params["a"], float)
    assert recipe.resolved["model"] == {"name": "net", "weights": "none", "a": 1.0, "b": [1.0, 2.0], "c": "x/y"}


@pytest.mark.parametrize(
    ("signature", "reason"),
    [
        ("a: Annotated[int, Ge(1)] = 0", "the default of 'a' breaks its own type: expected whole number ≥ 1, found 0"),
        ("a: int = 'x'", "the default of 'a' breaks its own type: expected whole number, found \"x\""),
        ("a: float = 1e999", "the default of 'a' breaks its own type: expected number, found inf"),
        ("a: str = b'x'", "the default of 'a' breaks its own type"),
        ("a: Annotated[int, Len(2)] = 3", "the parameters of architecture 'net' cannot be checked"),
        ("a: 3 = 3", "the parameters of architecture 'net' cannot be checked"),
    ],
)
def test_a_fault_of_the_plugin_is_told_at_the_plugin(tmp_path: Path, signature: str, reason: str) -> None:
    (problem,) = problems(with_plugin(tmp_path, signature), NET)
    assert problem.startswith("plugins/net.py:6: ")
    assert reason in problem


# Finding recipes and files


def test_a_recipe_is_found_by_path_or_bundled_name(tmp_path: Path) -> None:
    assert find_recipe("quickstart") == bundled("recipes") / "quickstart.toml"
    (tmp_path / "quickstart").mkdir()  # a folder of that name does not hide it
    assert find_recipe("quickstart") == bundled("recipes") / "quickstart.toml"
    mine = tmp_path / "mine"
    mine.write_text(BASE)
    assert find_recipe("mine") == Path("mine")
    assert find_recipe(str(mine)) == mine


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("quickstrat", "no such recipe, neither a file nor a bundled name; did you mean 'quickstart'?"),
        ("quickstart.toml", "did you mean 'quickstart'?"),
        ("mine/experimnt.toml", "did you mean 'mine/experiment.toml'?"),
        ("nowhere/x.toml", "known: darrennet, "),
        ("mine", "is a folder, not a recipe"),
        ("x" * 5000, "no such recipe"),
        ("~no-such-user/x.toml", "no such recipe"),
    ],
)
def test_a_recipe_that_is_not_there_is_told_with_the_nearest(name: str, found: str) -> None:
    Path("mine").mkdir()
    Path("mine/experiment.toml").write_text(BASE)
    with pytest.raises(UsageError) as caught:
        find_recipe(name)
    assert found in caught.value.problems[0].message


def test_a_path_in_a_recipe_is_taken_from_the_working_directory_else_beside_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipes" / "x.toml"
    (tmp_path / "recipes" / "beside").mkdir(parents=True)
    (tmp_path / "recipes" / "both").mkdir()
    (tmp_path / "both").mkdir()
    assert locate("beside", recipe) == tmp_path / "recipes" / "beside"
    assert locate("both", recipe) == tmp_path / "both"
    assert locate("neither", recipe) == tmp_path / "neither"
    assert locate("/absolute", recipe) == Path("/absolute")
    assert locate("~no-such-user/x", recipe) == tmp_path / "~no-such-user/x"
    assert locate("x" * 5000, recipe) == tmp_path / ("x" * 5000)


def test_a_recipe_that_is_there_is_suggested_where_its_ending_was_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "barns.toml").touch()
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "sheds.toml").touch()
    for name, there in (("barns", "barns.toml"), ("sheds", "recipes/sheds.toml")):
        with pytest.raises(UsageError, match=there):
            find_recipe(name)
