"""What `vocseg new` writes: that it works as it stands, and that nothing is harmed by writing it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vocseg import new
from vocseg.errors import EnvironmentFault, UsageError
from vocseg.new import KINDS, TEMPLATES, introduced, renamed, write_new
from vocseg.plugins import PACKAGE, bundled, discover, import_file
from vocseg.recipe.prepare import load_recipe

BUNDLED = [c for c in discover() if c.kind == "architecture" and c.origin == "bundled"]


def problems(*arguments: object, **options: object) -> list[str]:
    with pytest.raises(UsageError) as caught:
        write_new(*arguments, **options)  # type: ignore[arg-type]
    return [str(problem) for problem in caught.value.problems]


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def pytest_in(folder: Path, *arguments: str) -> str:
    """What a new pytest says of the tests in a folder; warnings are errors, as a strict project has it."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# What is written


def test_the_tests_that_are_written_pass(tmp_path: Path) -> None:
    # That of the template architecture is run with the README's chapter, in test_readme.py.
    write_new("architecture", "my_unet", tmp_path, copied="mini_unet")
    write_new("loss", "careful", tmp_path)
    assert "7 passed" in pytest_in(tmp_path)


def test_the_test_of_a_loss_notices_void_that_counts(tmp_path: Path) -> None:
    write_new("loss", "careless", tmp_path)
    plugin = tmp_path / "plugins" / "careless.py"
    text = plugin.read_text().replace(", ignore_index=VOID", "").replace("(logits, target,", "(logits, target % 3,")
    plugin.write_text(text)
    tests = import_file(tmp_path / "tests" / "test_careless.py")
    tests.test_a_step_down_the_gradient_lowers_it()
    for notices in (tests.test_void_pixels_change_nothing_and_get_no_gradient, tests.test_void_alone_gives_zero):
        with pytest.raises(AssertionError):
            notices()


@pytest.mark.parametrize("kind", KINDS)
def test_a_project_gets_a_plugin_a_recipe_and_a_test(tmp_path: Path, kind: str) -> None:
    written = write_new(kind, "mine", tmp_path)
    assert tree(tmp_path) == ["plugins/mine.py", "recipes/mine.toml", "tests/test_mine.py"]
    assert sorted(written.files) == [tmp_path / path for path in tree(tmp_path)]
    component = discover(project=tmp_path).get(kind, "mine")
    assert component.file == str(tmp_path / "plugins" / "mine.py")
    recipe, _ = load_recipe(str(tmp_path / "recipes" / "mine.toml"))
    assert "mine" in [component.name for component in recipe.components]
    assert recipe.data.name == "synthetic"


def test_a_loss_is_added_to_cross_entropy(tmp_path: Path) -> None:
    write_new("loss", "mine", tmp_path)
    recipe, _ = load_recipe(str(tmp_path / "recipes" / "mine.toml"))
    assert [part.name for part in recipe.losses] == ["cross_entropy", "mine"]


def test_the_loss_of_the_template_is_the_papers(tmp_path: Path) -> None:
    write_new("loss", "mine", tmp_path)
    loss = discover(project=tmp_path).get("loss", "mine").build({}, {"q": 0.5})
    # Two pixels of two classes with p = 1/4 and 1/2 for the true one, and one of void:
    # ((1 - sqrt(1/4)) / 0.5 + (1 - sqrt(1/2)) / 0.5) / 2 = (1 + 2 - sqrt 2) / 2
    logits = torch.tensor([[0.25, 0.5, 0.9], [0.75, 0.5, 0.1]]).log().reshape(1, 2, 1, 3)
    found = loss(logits, torch.tensor([[[0, 1, 255]]]))
    torch.testing.assert_close(found, torch.tensor((3 - 2**0.5) / 2))


def test_every_template_is_in_use_and_no_placeholder_is_left(tmp_path: Path) -> None:
    for kind in KINDS:
        write_new(kind, f"my_{kind}", tmp_path)
        write_new(kind, f"my_{kind}_package", tmp_path, package=True)
    text = "".join((tmp_path / path).read_text() for path in tree(tmp_path))
    assert "$" not in text
    assert new.PLACEHOLDER not in {
        node.id for node in ast.walk(ast.parse(text_of_python(tmp_path))) if isinstance(node, ast.Name)
    }
    kept = {path.relative_to(TEMPLATES).as_posix() for path in TEMPLATES.rglob("*") if path.is_file()}
    parts = {f"{kind}/{part}" for kind in KINDS for part in ("plugin.py", "recipe.toml", "test.py")}
    assert kept == {f"{part}.template" for part in (*parts, "package/pyproject.toml", "package/README.md")}


def text_of_python(folder: Path) -> str:
    return "\n".join(path.read_text() for path in folder.rglob("*.py"))


def test_a_package_is_a_folder_of_its_own_that_names_its_module(tmp_path: Path) -> None:
    written = write_new("architecture", "mine", tmp_path, package=True)
    files = ["README.md", "pyproject.toml", "recipes/mine.toml", "src/mine/__init__.py", "tests/test_mine.py"]
    assert tree(tmp_path / "mine") == files
    assert tree(tmp_path) == [f"mine/{path}" for path in files]
    assert any(command.startswith("pip install") for command in written.commands)


# Copies


@pytest.mark.parametrize("original", BUNDLED, ids=lambda component: component.name)
def test_every_bundled_architecture_can_be_copied_and_is_the_same_but_for_its_name(tmp_path: Path, original) -> None:
    write_new("architecture", "my_copy", tmp_path, copied=original.name)
    registry = discover(project=tmp_path)
    copy = registry.get("architecture", "my_copy")
    assert registry.broken == ()
    assert copy.file == str(tmp_path / "plugins" / "my_copy.py")
    assert (copy.doc, copy.parameters, copy.options) == (original.doc, original.parameters, original.options)
    text = Path(copy.file).read_text()
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring is not None
    assert docstring.startswith(f"my_copy: begun as a copy of {original.name} (vocseg ")
    # But for the name and that sentence, the code is the same.
    before, after = (code_of(Path(c.file), c.name) for c in (original, copy))
    assert before == after
    assert copy.load().__name__ == "my_copy"
    load_recipe(str(tmp_path / "recipes" / "my_copy.toml"))


def code_of(path: Path, name: str) -> str:
    """A file's code without its docstring, its function called by one name in all."""
    parsed = ast.parse(path.read_text())
    for node in ast.walk(parsed):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            node.name = "the_architecture"
        elif isinstance(node, ast.Name) and node.id == name:
            node.id = "the_architecture"
    return ast.dump(ast.Module(parsed.body[1:], []))


def test_there_are_architectures_to_copy() -> None:
    assert {"mini_unet", "fcn_baseline", "smp"} <= {component.name for component in BUNDLED}
    assert len(BUNDLED) == len(list(bundled("plugins").glob("[!_]*.py")))


def test_ones_own_architecture_can_be_copied_into_a_package(tmp_path: Path) -> None:
    write_new("architecture", "mine", tmp_path)
    write_new("architecture", "shared", tmp_path, copied="mine", package=True)
    text = (tmp_path / "shared" / "src" / "shared" / "__init__.py").read_text()
    assert text.startswith('"""shared: begun as a copy of mine (mine.py).\n\nA network to start from')
    assert "\ndef shared(" in text


def test_renaming_is_done_where_the_name_stands_for_the_function_and_nowhere_else() -> None:
    source = '''
from vocseg import architecture
WIDTHS = {"net": 3}  # net
@architecture(backbone="net")
def net(é: int) -> str:
    """A net."""
    other.net = "net"; é = net; return f(net=net, é=é.net) + "é net" + net.__name__
def network(): return net
'''
    assert (
        renamed(source, "net", "größer", "x.py")
        == '''
from vocseg import architecture
WIDTHS = {"net": 3}  # net
@architecture(backbone="net")
def größer(é: int) -> str:
    """A net."""
    other.net = "net"; é = größer; return f(net=größer, é=é.net) + "é net" + größer.__name__
def network(): return größer
'''
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def net(): ...\ndef f(net): return net", "'net' means several things"),
        ("def net(): ...\nimport net.parts", "'net' means several things"),
        ("def net(): ...\nclass A:\n    def net(self): ...", "'net' means several things"),
        ("def net(): ...\ndef new(): ...", "new: is a name that x.py uses itself"),
        ("import torch as new\ndef net(): ...", "new: is a name that x.py uses itself"),
        ("def net(): return new(1)", "new: is a name that x.py uses itself"),
        ("def net(a, *, new): ...", "new: is a name that x.py uses itself"),
    ],
)
def test_a_name_that_means_something_else_is_not_touched(source: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        renamed(source, "net", "new", "x.py")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"""One line."""\nx = 1\n', '"""New.\n\nOne line.\n"""\nx = 1\n'),
        ('"""Two.\n\nLines.\n"""\nx = 1\n', '"""New.\n\nTwo.\n\nLines.\n"""\nx = 1\n'),
        ('# A comment.\nr"""Raw \\d."""\n', '# A comment.\nr"""New.\n\nRaw \\d.\n"""\n'),
        ("x = 1\n", '"""New."""\n\nx = 1\n'),
        ('x = """Two."""\n', '"""New."""\n\nx = """Two."""\n'),
    ],
)
def test_a_docstring_begins_with_where_the_copy_is_from(before: str, after: str) -> None:
    assert introduced(before, "New.") == after


def test_what_is_not_alone_in_one_file_cannot_be_copied(tmp_path: Path) -> None:
    folder = tmp_path / "plugins"
    (folder / "parts").mkdir(parents=True)
    head = "from vocseg import architecture\n"
    (folder / "two.py").write_text(f"{head}@architecture\ndef one(): 'One.'\n@architecture\ndef two(): 'Two.'\n")
    (folder / "parts" / "__init__.py").write_text(f"{head}from .b import c\n@architecture\ndef parts(): 'Parts.'\n")
    assert problems("architecture", "mine", tmp_path, copied="one") == [
        f"{folder / 'two.py'}:3: 'one' shares its file with architecture 'two'; copy it by hand"
    ]
    (found,) = problems("architecture", "mine", tmp_path, copied="parts")
    assert "'parts' is made of several files" in found
    (found,) = problems("architecture", "mine", tmp_path, copied="mini_unte")
    assert found == "--from: no architecture is named 'mini_unte'; did you mean 'mini_unet'?"
    (found,) = problems("loss", "mine", tmp_path, copied="dice")
    assert found == "--from: only architectures can be copied; a loss begins as the template"
    assert tree(tmp_path) == ["plugins/parts/__init__.py", "plugins/two.py"]


# Names and places


@pytest.mark.parametrize("name", ["", "my-net", "2net", "for", "../net", "\N{LATIN SMALL LIGATURE FI}ne"])
def test_a_name_must_be_one_that_python_takes(tmp_path: Path, name: str) -> None:
    (found,) = problems("architecture", name, tmp_path)
    assert "cannot be the name of a Python function" in found
    assert tree(tmp_path) == []


def test_a_private_name_would_not_be_found(tmp_path: Path) -> None:
    assert "are private" in problems("architecture", "_net", tmp_path)[0]


def test_a_name_that_is_taken_is_refused_with_its_place(tmp_path: Path) -> None:
    (found,) = problems("loss", "dice", tmp_path)
    assert found.startswith("dice: loss 'dice' is already defined at ")
    assert found.endswith("; choose another name")
    write_new("architecture", "dice", tmp_path)  # of another kind
    found, *_ = problems("architecture", "dice", tmp_path)
    assert f"already defined at {tmp_path / 'plugins' / 'dice.py'}:13" in found


@pytest.mark.parametrize("name", ["nn", "Network", "width", "architecture"])
def test_a_name_that_the_template_uses_is_refused(tmp_path: Path, name: str) -> None:
    assert problems("architecture", name, tmp_path) == [
        f"{name}: is a name that the template uses itself; choose another name"
    ]


def test_a_package_is_not_named_as_a_module_that_is_there(tmp_path: Path) -> None:
    (found,) = problems("architecture", "json", tmp_path, package=True)
    assert found.startswith("json: a Python module has this name already: ")
    for name in ("größer", "net_"):
        assert "cannot be the name of a package" in problems("architecture", name, tmp_path, package=True)[0]
        write_new("architecture", name, tmp_path)


def test_files_that_are_in_the_way_are_all_named_and_nothing_is_written(tmp_path: Path) -> None:
    for path in ("recipes/mine.toml", "tests/test_mine.py"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text("kept")
    found = problems("architecture", "mine", tmp_path, copied="nowhere")
    assert [line.split(":")[0] for line in found] == [
        str(tmp_path / "recipes" / "mine.toml"),
        str(tmp_path / "tests" / "test_mine.py"),
        "--from",
    ]
    assert tree(tmp_path) == ["recipes/mine.toml", "tests/test_mine.py"]
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "README.md").write_text("kept")
    (found_one,) = problems("architecture", "pkg", tmp_path, package=True)
    assert "README.md: is there already" in found_one


def test_the_plugins_of_a_project_are_not_hidden_from_its_recipes(tmp_path: Path) -> None:
    write_new("loss", "outer", tmp_path)
    inside = tmp_path / "recipes"
    (found,) = problems("loss", "inner", inside)
    assert f"would hide the plugins of {tmp_path / 'plugins'}" in found
    write_new("loss", "packed", inside, package=True)  # hides nothing
    (inside / "plugins").mkdir()
    write_new("loss", "inner", inside)


def test_what_cannot_be_written_whole_is_not_written_at_all(tmp_path: Path) -> None:
    (tmp_path / "tests").write_text("a file where a folder is wanted")
    with pytest.raises(EnvironmentFault, match=r"test_mine\.py: cannot be written"):
        write_new("architecture", "mine", tmp_path)
    assert tree(tmp_path) == ["tests"]
