"""The glossary names each concept once, and every class that it names exists."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| (?P<word>[^|]+) \| (?P<meaning>[^|]+) \| (?P<classes>[^|]*) ?\|$")


def rows() -> list[tuple[str, str, list[str]]]:
    """Return the rows of the glossary: words, meaning, classes."""
    lines = (ROOT / "docs/glossary.md").read_text(encoding="utf-8").splitlines()
    matches = [match for line in lines if (match := ROW.match(line))]
    return [(m["word"], m["meaning"], re.findall(r"`(\w+)`", m["classes"])) for m in matches if m["word"] != "word"]


def test_a_word_has_one_meaning_in_one_sentence() -> None:
    words = [word.strip() for listed, _, _ in rows() for word in listed.split(",")]
    assert len(words) > 80
    assert len(words) == len(set(words))
    for word, meaning, _ in rows():
        assert meaning.strip().endswith("."), word


def test_classes_exist() -> None:
    named = {name for _, _, classes in rows() for name in classes}
    defined = {
        node.name
        for folder in ("spec", "compiler", "runtime")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    assert len(named) > 60
    assert named <= defined, sorted(named - defined)
