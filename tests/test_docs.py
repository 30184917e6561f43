"""The documents are true: their code runs, their patterns check, their commands print the quoted output.

Every document runs in order, all blocks of a file in one folder and one Python namespace:

- `attn` blocks are checked; a name after `attn` saves the block as that file, `error CODE` names the expected error;
- `python` blocks run; a `text` block right after one is the expected output, in which `…` matches anything; a block
  with `python needs NAME` is left out, with a warning, if that package is not installed;
- `console` blocks: each line `$ attnc …` is run, and the lines after it are the expected output, with `…` too.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from attnc import AttncError, SpecError, compile_attention
from attnc.runtime import fallbacks
from attnc.runtime.call import call_errors as runtime_errors
from attnc.runtime.call.tensor_checks import REFUSED
from attnc.runtime.fallbacks import KINDS
from attnc.runtime.process.environment import VARIABLES
from attnc.runtime.settings import Settings
from attnc.runtime.texts.library import ModuleLoader, library_files, library_names
from attnc.spec.load import check_source
from attnc.spec.reading.source_text import decode

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "spec" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    line: int
    words: tuple[str, ...]
    text: str
    follows: bool
    """Whether the block is directly after its predecessor."""

    @property
    def language(self) -> str:
        return self.words[0] if self.words else ""


def blocks(path: Path) -> Iterator[Block]:
    text = path.read_text(encoding="utf-8")
    end = 0
    for match in FENCE.finditer(text):
        between = text[end : match.start()]
        line = text.count("\n", 0, match.start()) + 1
        yield Block(line, tuple(match["info"].split()), match["text"], end > 0 and not between.strip())
        end = match.end()


def matches(expected: str, printed: str) -> bool:
    """Return whether the expected text equals the printed one, up to `…`, spaces at line ends and blank lines."""
    wanted = "\n".join(line.rstrip() for line in expected.strip().splitlines() if line.strip())
    actual = "\n".join(line.rstrip() for line in printed.strip().splitlines() if line.strip())
    pattern = "(?s:.*?)".join(re.escape(part) for part in wanted.split("…"))
    return re.fullmatch(pattern, actual) is not None


def check_attn(block: Block) -> None:
    _, *rest = block.words
    if rest and rest[0].endswith(".attn"):
        Path(rest.pop(0)).write_text(block.text, encoding="utf-8")
    wanted = {rest[1]} if rest[:1] == ["error"] else set()
    diagnostics = check_source(decode(block.text, "document.attn"), ModuleLoader(Path()))
    assert {d.code for d in diagnostics} == wanted, "\n\n".join(f"{d.code} {d.message}" for d in diagnostics)


def missing(block: Block) -> list[str]:
    """Return the packages that a block needs and that are not installed."""
    return [name for name in block.words[2:] if block.words[1:2] == ("needs",) and find_spec(name) is None]


def run_python(block: Block, namespace: dict[str, Any], where: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(block.text, where, "exec"), namespace)
    return output.getvalue()


def run_console(block: Block) -> None:
    from attnc.runtime.cli import main

    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        program, *arguments = shlex.split(command)
        assert program == "attnc", command
        output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="\n")
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            main(arguments)
        output.flush()
        printed = output.buffer.getvalue().decode()
        assert matches(expected, printed), f"$ {command}\n{printed}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_blocks(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "document"}
    printed: str | None = None
    for block in blocks(path):
        where = f"{path.relative_to(ROOT)}:{block.line}"
        match block.language:
            case "attn":
                check_attn(block)
            case "python" if missing(block):
                warnings.warn(f"{where} is left out: {', '.join(missing(block))} is not installed", stacklevel=1)
            case "python":
                printed = run_python(block, namespace, where)
                continue
            case "console":
                run_console(block)
            case "text" if block.follows and printed is not None:
                assert matches(block.text, printed), f"{where} prints\n{printed}"
            case "text" | "sh":
                pass
            case other:
                raise AssertionError(f"{where}: a block in `{other}` is not tested")
        printed = None


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(path: Path) -> None:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_the_catalogue_index_and_pages_have_every_pattern() -> None:
    index = (ROOT / "docs" / "catalogue.md").read_text(encoding="utf-8")
    pictures = set()
    for name, file in library_files().items():
        family = file.parent.name
        page = (ROOT / "docs" / "catalogue" / f"{family}.md").read_text(encoding="utf-8")
        (section,) = re.findall(rf"^## {name}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
        assert file.read_text(encoding="utf-8") in section
        if name in library_names():
            assert f"](catalogue/{family}.md#{name})" in index
            assert "\nGrowth: " in section and (
                "element " in section or "memory " in section or "No ladder: " in section
            )
            pictures |= set(re.findall(r"\]\(\.\./(pictures/\S+\.svg)\)", section))
    kept = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs" / "pictures").rglob("*.svg")}
    assert pictures == kept


@pytest.mark.slow
@pytest.mark.xdist_group("catalogue")
def test_generated_files_are_current() -> None:
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    wrong = generate["stale"]()
    assert not wrong, f"run python docs/generate.py: {wrong}"


def test_every_system_has_its_files_and_every_file_a_system() -> None:
    systems = runpy.run_path(str(ROOT / "docs" / "systems.py"))
    assert systems["names"]() == {*library_names()}
    for system in systems["systems"]():
        assert system.files or system.why, system


# --- the language reference ------------------------------------------------------------------------------------------

SUPPORT = re.compile(r"^\| `(?P<line>[^`]+)` \| (?P<answer>yes|A\d{3}) \|", re.MULTILINE)
PRELUDE = """\
pattern example(window: int = 4, rates: real[head] = [1], sizes: int[2] = [3, 3])
    input doc: int[batch, token]
    input seen: bool[query, key]
    input table: int[query, width]
"""


ROUND = "        per a = q // 4, b = k // 4\n        keep any(visible for q in a, k in b)"


def support_table() -> list[tuple[str, str]]:
    text = (ROOT / "spec" / "README.md").read_text(encoding="utf-8")
    return [(match["line"], match["answer"]) for match in SUPPORT.finditer(text)]


@pytest.mark.parametrize(("line", "answer"), support_table())
def test_support_table(line: str, answer: str) -> None:
    if line.startswith("recurrence"):
        text = f"{line}\n    state S: [dk, dv]\n    step S = S + outer(k, v)\n    read q @ S\n"
    else:
        body = "\n        visible k <= q" if line.startswith("branch") else ""
        body = "\n        keep 0 < 1" if line.startswith("select") else body
        body = f"\n{ROUND}" if line.startswith("round") else body
        text = f"{PRELUDE}    {line}{body}\n"
    if answer == "yes":
        run_line(text)
        return
    with pytest.raises(SpecError) as caught:
        compile_attention(text)
    assert {d.code for d in caught.value.diagnostics} == {answer}


def run_line(text: str) -> None:
    attend = compile_attention(text)
    q, k, v = (torch.randn(1, 1, 16, 8) for _ in range(3))
    inputs: dict[str, Any] = {
        "doc": torch.arange(16)[None] // 5,
        "seen": torch.rand(16, 16) < 0.5,
        "table": torch.randint(16, (16, 3)),
        **({"prefix": torch.tensor([4])} if "prefix" in text else {}),
        **({"bias": torch.zeros(16)} if "bias" in text else {}),
    }
    torch.testing.assert_close(attend(q, k, v, **inputs), attend.reference(q, k, v, **inputs))


def test_support_table_names_every_statement() -> None:
    from attnc.spec.reading.phrases import BODY_WORDS

    lines = {line.split()[0] for line, _ in support_table()}
    inside = {"covers", "from", "keep", "always", "state", "step", "read", "scan", "reset", "return"}
    assert lines >= set(BODY_WORDS) - inside


# --- the API page ----------------------------------------------------------------------------------------------------


def subclasses(kind: type[Exception]) -> set[type[Exception]]:
    return {kind}.union(*(subclasses(sub) for sub in kind.__subclasses__()))


def test_the_reference_lists_every_error() -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    for error in subclasses(AttncError):
        if error.__module__.startswith("attnc"):
            base = next(b for b in error.__mro__ if b.__module__ == "builtins")
            assert re.search(rf"^\| `{error.__name__}` \| `{base.__name__}` \|", text, re.MULTILINE), error


def test_the_reference_lists_every_variable_and_fallback() -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    for name in [*(x.name for x in VARIABLES), *(kind.name for kind in KINDS)]:
        assert f"\n| `{name}` |" in text, name


def test_every_kind_of_fallback_is_listed_and_noted() -> None:
    kinds = {name: value for name, value in vars(fallbacks).items() if isinstance(value, fallbacks.Kind)}
    assert set(kinds.values()) == set(KINDS)
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "runtime").rglob("*.py")]
    noted = set(re.findall(r"\bnote\([^()]*?, ([A-Z_]+),", "".join(texts)))
    assert noted | {"OTHERS"} == set(kinds)


def test_all_errors_are_public() -> None:
    import attnc

    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert {error.__name__ for error in generate["public_errors"]()} <= set(attnc.__all__)


def test_api_lists_every_refusal_and_setting() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name in [*REFUSED, *Settings.__dataclass_fields__]:
        assert f"`{name}`" in text, name


def test_api_names_exist() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    attend = compile_attention("causal")
    names = re.findall(r"`attend\.(\w+)", text)
    assert {"reference", "mask", "plan", "picture"} <= set(names)
    for name in names:
        assert hasattr(type(attend), name), name
    public = {name for name in dir(attend) if not name.startswith("_")}
    assert public <= set(names)


def test_the_catalogue_lists_the_library() -> None:
    text = (ROOT / "docs" / "catalogue.md").read_text(encoding="utf-8")
    for name in library_names():
        assert f"| [`{name}`]" in text, name


def test_the_readme_is_short_and_counts_the_library() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert f"{len(library_names())} patterns" in text


def test_errors_are_public() -> None:
    import attnc

    for name, value in vars(runtime_errors).items():
        if isinstance(value, type) and issubclass(value, AttncError):
            assert getattr(attnc, name) is value
    assert issubclass(SpecError, ValueError)
