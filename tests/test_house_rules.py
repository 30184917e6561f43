"""The mechanical part of CONTRIBUTING's house rules: unique names, openings of docstrings, sizes of files."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = ("spec", "compiler", "runtime", "src/attnc")
"""Folders in which class names are unique."""
READ_BY_PEOPLE = (*PRODUCT, "benchmarks", "docs", "examples", "tests")
"""Folders whose docstrings must open with what they describe."""
LONG = {
    "compiler/ir/nodes.py": "every node of the IR in one file, so that it can be read whole",
    "spec/program.py": "every node of the checked program in one file, so that it can be read whole",
}
"""Files above `MOST_LINES`, and why they are long."""
MOST_LINES = 600
NO_OPENING = re.compile(r"(Of|Those|These|The same|What|With|Which|One of)\b")
"""Openings whose noun is elsewhere: a docstring is read alone, in an editor's tooltip."""


def sources(*folders: str) -> list[Path]:
    """Return the Python files of folders; the links in `src/attnc` lead to folders that are listed themselves."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in paths if path.parent == ROOT / "src/attnc" or "src" not in path.relative_to(ROOT).parts]


def documented(path: Path) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the module and every class and function in it, nested ones too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def repeated(places: dict[str, list[str]]) -> dict[str, list[str]]:
    return {name: paths for name, paths in places.items() if len(paths) > 1}


def imported(path: Path) -> set[str]:
    """Return the first parts of the names of all modules that a file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in names}


def test_class_names_are_unique() -> None:
    places = defaultdict(list)
    for path in sources(*PRODUCT):
        for node in documented(path):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert len(places) > 500
    assert not repeated(places)


def test_class_names_are_unique_in_the_benchmarks() -> None:
    places = defaultdict(list)
    for path in sources("benchmarks"):
        for node in documented(path):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert len(places) > 40
    assert not repeated(places)


def test_modules_of_the_benchmarks_have_no_import_cycles() -> None:
    """Imports inside functions count too."""
    paths = {path.stem: path for path in (ROOT / "benchmarks").glob("*.py")}
    imports = {name: imported(path) & paths.keys() for name, path in paths.items()}
    assert len(imports) > 40
    TopologicalSorter(imports).prepare()


def product_imports(*folders: str) -> dict[str, set[str]]:
    """Return the modules that each module of the product imports when it runs, in functions too."""
    modules = {"attnc." + ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sources(*folders)}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    return {name: set(running_imports(path)) & modules.keys() - {name} for name, path in modules.items()}


def running_imports(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports, and every imported name as if it were a module; not those for types."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in for_types:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from names
            if not all(
                (ROOT / name.removeprefix("attnc.").replace(".", "/")).with_suffix(".py").exists() for name in names
            ):
                yield node.module


def test_modules_of_the_product_have_no_import_cycles() -> None:
    """Imports inside functions count too; imports for type checking do not run."""
    imports = product_imports("spec", "compiler", "runtime")
    assert len(imports) > 500
    assert "attnc.compiler.ir.fold" in imports["attnc.compiler.ir.rewrite"]
    assert "attnc.runtime.api.attention" in imports["attnc.runtime.commands.analysed"], "an import inside a function"
    TopologicalSorter(imports).prepare()


def test_imports_inside_functions_say_why() -> None:
    """The reason stands on the import's line, or above it: optional, slow to import, needed for one use alone."""
    without, count = [], 0
    for path in sources("spec", "compiler", "runtime"):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        functions = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
        for node in (inner for function in functions for inner in ast.walk(function)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                count += 1
                around = lines[node.lineno - 2 : node.end_lineno]
                if not any("# " in line for line in around):
                    without.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert count > 100
    assert not without


def test_file_stems_are_unique() -> None:
    places = defaultdict(list)
    for path in sources("spec", "compiler", "runtime"):
        if path.name != "__init__.py":
            places[path.stem].append(str(path.relative_to(ROOT)))
    assert len(places) > 400
    assert not repeated(places)


def test_docstrings_open_with_what_they_describe() -> None:
    """Check docs of modules, classes, functions, constants and fields."""
    openings, count = {}, 0
    for path in sources(*READ_BY_PEOPLE):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                docstring, count = node.value.value.strip(), count + 1
                if NO_OPENING.match(docstring):
                    openings[f"{path.relative_to(ROOT)}:{node.lineno}"] = docstring.splitlines()[0]
    assert count > 8000
    assert not openings


@pytest.mark.parametrize("opening", ["Of the rows.", "These are rows.", "The same for keys.", "One of them."])
def test_an_opening_without_its_noun_is_found(opening: str) -> None:
    assert NO_OPENING.match(opening)


def test_files_are_short_or_say_why_not() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources(*READ_BY_PEOPLE)
    }
    long = {path: length for path, length in lengths.items() if length > MOST_LINES}
    assert {path for path in long if path not in LONG} == set()
    assert set(LONG) == long.keys() & LONG.keys(), "a file in LONG is no longer long"
