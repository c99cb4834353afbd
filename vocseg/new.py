"""What a new plugin begins with: the component, a recipe that trains it and a test, in a project or as a package.

Nothing of it is run, and no file that is there already is touched.
"""

import ast
import importlib.util
import keyword
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from string import Template

from vocseg import __version__
from vocseg.errors import EnvironmentFault, Problem, UsageError, shown_path
from vocseg.plugins import PACKAGE, discover
from vocseg.registry import Registry

TEMPLATES = PACKAGE / "templates"
KINDS = ("architecture", "loss")
PLACEHOLDER = "start"  # the marked function of a template


@dataclass(frozen=True)
class Written:
    """The files of a new plugin, and the commands to try next."""

    files: tuple[Path, ...]
    commands: tuple[str, ...]


def write_new(kind: str, name: str, folder: Path, *, copied: str | None = None, package: bool = False) -> Written:
    """Writes a new plugin with its recipe and its test, all of which work as they are.

    Args:
        kind: one of `KINDS`.
        folder: the project; plugins/, recipes/ and tests/ are in it, or the new package will be.
        copied: an architecture whose source the new one begins as, rather than as the template.
        package: write an installable package in place of the file in plugins/.

    Raises:
        UsageError: the name cannot be used, what is to be copied cannot be, or a file is in the way.
        EnvironmentFault: a file cannot be written; none is left behind.
    """
    folder = folder.absolute()
    registry = discover(project=folder)
    problems = _wrong_with_name(kind, name, registry, package)
    # Without a usable name there are no files that could be in the way.
    root = folder / name if package else folder
    plugin = root / "src" / name / "__init__.py" if package else root / "plugins" / f"{name}.py"
    recipe = root / "recipes" / f"{name}.toml"
    test = root / "tests" / f"test_{name}.py"
    extra = [root / "pyproject.toml", root / "README.md"] if package else []
    files = (plugin, recipe, test, *extra)
    if not problems:
        problems += [
            Problem(shown_path(path), "is there already, and nothing is overwritten; move it, or choose another name")
            for path in files
            if os.path.lexists(path)
        ]
    if not package:
        problems += _would_be_hidden(folder, registry)
    source = ""
    try:
        source = _source(kind, name if name.isidentifier() else "nameless", registry, copied)
    except UsageError as error:
        problems += error.problems
    if problems:
        raise UsageError(*problems)

    words = {"name": name, "kind": kind, "plugin": plugin.relative_to(root).as_posix()}
    texts = [source, *(_template(f"{kind}/{part}").substitute(words) for part in ("recipe.toml", "test.py"))]
    texts += [_template(f"package/{path.name}").substitute(words) for path in extra]
    _write(dict(zip(files, texts, strict=True)))
    return Written(files, _next(kind, name, root, plugin, recipe, test, package))


def _next(kind: str, name: str, root: Path, plugin: Path, recipe: Path, test: Path, package: bool) -> tuple[str, ...]:
    checked = plugin if kind == "architecture" else recipe
    return (
        *([f"pip install -e {os.path.join(os.curdir, shown_path(root))}", f"vocseg list {name}"] if package else []),
        f"vocseg check {shown_path(checked)}",
        f"vocseg run {shown_path(recipe)}",
        f"pytest {shown_path(test)}",
    )


def _wrong_with_name(kind: str, name: str, registry: Registry, package: bool) -> list[Problem]:
    # Python reads some letters as others, such as a ligature as its two letters; recipes do not.
    if not name.isidentifier() or keyword.iskeyword(name) or unicodedata.normalize("NFKC", name) != name:
        message = "cannot be the name of a Python function; use letters, digits and _, such as my_net"
        return [Problem(name, message)]
    problems = []
    if name.startswith("_"):
        problems.append(Problem(name, "names with a leading _ are private and are not found; leave it out"))
    if (found := registry.find(kind, name)) is not None:
        place = shown_path(found.source)
        problems.append(Problem(name, f"{kind} '{name}' is already defined at {place}; choose another name"))
    elif any((c.kind, c.name) == (kind, name) for c in registry.clashes):
        problems.append(Problem(name, registry.missing(kind, name)))
    if package and not problems:
        if not name.isascii() or name.endswith("_"):
            message = "cannot be the name of a package; use ASCII letters, digits and _, and end with no _"
            problems.append(Problem(name, message))
        elif (spec := importlib.util.find_spec(name)) is not None and spec.origin is not None:
            message = f"a Python module has this name already: {spec.origin}; choose another name"
            problems.append(Problem(name, message))
    return problems


def _would_be_hidden(folder: Path, registry: Registry) -> list[Problem]:
    """Recipes see the nearest folder `plugins` only: a new one here must not come between them and theirs."""
    above = {c.origin for c in registry if os.path.isabs(c.origin)} - {str(folder.resolve() / "plugins")}
    return [
        Problem(
            "plugins",
            f"a new folder here would hide the plugins of {origin} from the recipes here; "
            f"go to {os.path.dirname(origin)}, or make the folder yourself",
        )
        for origin in above
        if not os.path.isdir(folder / "plugins")
    ]


def _source(kind: str, name: str, registry: Registry, copied: str | None) -> str:
    """The new plugin's text: the template's, or that of the architecture to begin as.

    Raises:
        UsageError: there is no such architecture, it is not alone in one file, or the name does not fit in.
    """
    if copied is None:
        return renamed(_template(f"{kind}/plugin.py").template, PLACEHOLDER, name, "the template")
    if kind != "architecture":
        raise UsageError(Problem("--from", f"only architectures can be copied; a {kind} begins as the template"))
    original = registry.find(kind, copied)
    if original is None:
        raise UsageError(Problem("--from", registry.missing(kind, copied)))
    where = shown_path(original.source)
    others = [f"{c.kind} '{c.name}'" for c in registry if c.file == original.file and c is not original]
    if others:
        raise UsageError(Problem(where, f"'{copied}' shares its file with {', '.join(others)}; copy it by hand"))
    text = Path(original.file).read_text(encoding="utf-8")
    if any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(ast.parse(text))):
        raise UsageError(Problem(where, f"'{copied}' is made of several files; copy its folder by hand"))
    ours = original.origin in ("vocseg", "bundled")
    origin = f"vocseg {__version__}" if ours else Path(original.file).name
    return introduced(renamed(text, copied, name, where), f"{name}: begun as a copy of {copied} ({origin}).")


def renamed(source: str, old: str, new: str, where: str) -> str:
    """Source text with a function at its top level called something else, where it is defined and where it is used.

    Raises:
        UsageError: one of the two names means something else in there.
    """
    tree = ast.parse(source)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == old]
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    meant = {name for node in ast.walk(tree) if node not in functions for name in _named(node)}
    if old in meant or len(functions) != 1:
        raise UsageError(Problem(where, f"'{old}' means several things in this file; copy it by hand"))
    if new in meant or any(node.id == new for node in uses):
        raise UsageError(Problem(new, f"is a name that {where} uses itself; choose another name"))

    lines = source.encode().split(b"\n")  # positions are those of bytes
    places = [(node.lineno - 1, node.col_offset) for node in uses if node.id == old]
    line = functions[0].lineno - 1
    places.append((line, lines[line].index(old.encode(), functions[0].col_offset + len("def "))))
    for line, column in sorted(places, reverse=True):
        before, after = lines[line][:column], lines[line][column:]
        if not after.startswith(old.encode()):  # within an f-string, before Python 3.12
            raise UsageError(Problem(where, f"'{old}' stands where its position cannot be told; copy it by hand"))
        lines[line] = before + new.encode() + after.removeprefix(old.encode())
    return b"\n".join(lines).decode()


def _named(node: ast.AST) -> list[str]:
    """The names that a node gives to something, but for assignments."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.arg):
        return [node.arg]
    if isinstance(node, ast.alias):
        return [(node.asname or node.name).partition(".")[0]]
    return []


def introduced(source: str, sentence: str) -> str:
    """Source text whose docstring begins with another sentence."""
    first = ast.parse(source).body[0]
    text = ast.get_source_segment(source, first) or ""
    quotes = text.find('"""')
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and quotes in (0, 1)
    if not is_docstring:
        return f'"""{sentence}"""\n\n{source}'
    said = text[quotes + 3 : -3].strip()
    return source.replace(text, f'{text[:quotes]}"""{sentence}\n\n{said}\n"""', 1)


def _template(name: str) -> Template:
    return Template((TEMPLATES / f"{name}.template").read_text(encoding="utf-8"))


def _write(texts: dict[Path, str]) -> None:
    """Writes all the files, or none."""
    written = []
    for path, text in texts.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "x", encoding="utf-8") as file:
                written.append(path)
                file.write(text)
        except OSError as error:
            for done in written:
                done.unlink()
            message = f"cannot be written: {error.strerror}; nothing was"
            raise EnvironmentFault(Problem(shown_path(path), message)) from error
