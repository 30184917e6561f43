"""Every installation contains the files of the folders, however it is built, and each part imports only what it needs.

Every build runs on a copy, without network, with the setuptools of this environment.
"""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "attnc": ROOT / "src" / "attnc",
    "attnc.compiler": ROOT / "compiler",
    "attnc.runtime": ROOT / "runtime",
    "attnc.spec": ROOT / "spec",
    "attnc.stdlib_patterns": ROOT / "stdlib_patterns",
}
LINKED = [name.removeprefix("attnc.") for name in FOLDERS if name != "attnc"]

# One worker runs the whole file, so that each wheel is built once.
pytestmark = pytest.mark.xdist_group("packaging")


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[0]} failed\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_python(code: str, cwd: Path, path: Path = ROOT / "src") -> str:
    """Run `code` in a new interpreter that finds attnc under `path`."""
    return run(sys.executable, "-c", f"import sys; sys.path.insert(0, {str(path)!r})\n{code}", cwd=cwd)


def is_installable(path: Path) -> bool:
    junk = path.name.startswith(".") or path.name.endswith("~") or path.suffix in {".pyc", ".pyo"}
    return path.is_file() and not junk and "__pycache__" not in path.parts


def files_on_disk() -> set[str]:
    """Return every file of the packages by its installed name."""
    files: set[str] = set()
    for package, folder in FOLDERS.items():
        paths = folder.iterdir() if package == "attnc" else folder.rglob("*")
        files |= {
            f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}"
            for path in paths
            if is_installable(path)
        }
    return files


def project_table() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return table


def files_in(wheel: Path) -> set[str]:
    """Return the wheel's files without its own records."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def source_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the checkout as git would deliver it: no environment, no build output, links kept as links."""
    copy = tmp_path_factory.mktemp("source") / "attnc"
    junk = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=junk)
    return copy


@pytest.fixture(scope="module")
def wheel(source_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", out, cwd=source_copy)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def wheel_from_sdist(source_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=source_copy)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel, cwd=target)
    return target


def test_packages_are_the_folders_with_an_init_file() -> None:
    on_disk = {
        Path(name).parent.as_posix().replace("/", ".") for name in files_on_disk() if name.endswith("/__init__.py")
    }
    listed = project_table()["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(on_disk)


def test_every_module_is_inside_a_package() -> None:
    """A folder of modules without `__init__.py` works in a checkout but is missing from the wheel."""
    files = files_on_disk()
    homeless = {
        name for name in files if name.endswith(".py") and f"{Path(name).parent.as_posix()}/__init__.py" not in files
    }
    assert homeless == set()


@pytest.mark.parametrize("name", LINKED)
def test_links_point_to_the_folders(name: str) -> None:
    link = ROOT / "src" / "attnc" / name
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == ROOT / name


def test_wheel_holds_every_file_and_nothing_else(wheel: Path) -> None:
    assert sorted(files_in(wheel)) == sorted(files_on_disk())


def test_wheel_holds_grammar_library_and_type_marker(wheel: Path) -> None:
    files = files_in(wheel)
    assert "attnc/py.typed" in files
    assert any(name.startswith("attnc/spec/") and name.endswith(".lark") for name in files)
    assert any(name.startswith("attnc/stdlib_patterns/") and name.endswith(".attn") for name in files)


def test_wheel_has_one_top_level_name(wheel: Path) -> None:
    assert {name.split("/")[0] for name in files_in(wheel)} == {"attnc"}


def test_wheel_from_sdist_is_the_same(wheel: Path, wheel_from_sdist: Path) -> None:
    assert sorted(files_in(wheel_from_sdist)) == sorted(files_in(wheel))


def test_installed_wheel_finds_its_data(installed: Path, tmp_path: Path) -> None:
    code = """
from importlib.resources import files
import attnc, attnc.compiler, attnc.runtime, attnc.spec, attnc.stdlib_patterns
for module in (attnc, attnc.compiler, attnc.runtime, attnc.spec, attnc.stdlib_patterns):
    print(module.__file__)
data = [*files("attnc.spec").iterdir(), *(files("attnc.stdlib_patterns") / "masks").iterdir()]
assert any(entry.name.endswith(".lark") and entry.read_text(encoding="utf-8") for entry in data)
assert any(entry.name == "causal.attn" and entry.read_text(encoding="utf-8") for entry in data)
"""
    places = run_python(code, tmp_path, path=installed).split()
    assert all(place.startswith(str(installed)) for place in places)


def test_description_has_no_relative_link_or_picture(wheel: Path) -> None:
    """A package index resolves relative paths against its own address."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        headers, _, text = archive.read(metadata).decode().partition("\n\n")
    assert "Description-Content-Type: text/markdown" in headers
    assert text.startswith("# attnc\n")
    assert "![" not in text
    assert [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target] == []


def test_command_is_installed(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        assert "attnc = attnc.runtime.cli:main" in archive.read(entry_points).decode()


@pytest.mark.parametrize("module", ["attnc", "attnc.spec", "attnc.compiler"])
def test_imports_neither_torch_nor_triton(module: str, tmp_path: Path) -> None:
    code = f"import {module}\nprint(sorted({{'torch', 'triton'}} & sys.modules.keys()))"
    assert run_python(code, tmp_path).strip() == "[]"


def test_attention_runs_without_triton(tmp_path: Path) -> None:
    code = """
sys.modules["triton"] = None
import torch
import attnc
q = torch.randn(1, 2, 5, 8)
out = attnc.compile_attention("causal")(q, q, q)
print(tuple(out.shape))
"""
    assert run_python(code, tmp_path).strip() == "(1, 2, 5, 8)"


def test_import_rules_hold() -> None:
    """The contracts of `[tool.importlinter]`; `lint-imports` prints the offending chain."""
    run(Path(sys.executable).with_name("lint-imports"), "--no-cache", cwd=ROOT)
