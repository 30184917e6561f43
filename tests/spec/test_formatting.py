"""The formatter's output is unique and stable, keeps every word and comment, and has the meaning of its input."""

from __future__ import annotations

import inspect
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lark import Token, Tree

from attnc.spec.errors import SpecError
from attnc.spec.formatting import formatted
from attnc.spec.reading.parse import _parse_tree
from attnc.spec.reading.source_text import decode
from attnc.spec.source import SourceFile

ROOT = Path(__file__).parents[2]
OURS = sorted([*(ROOT / "stdlib_patterns").glob("*/*.attn"), *(ROOT / "examples").glob("*.attn")])
TEXTS = [*OURS, *sorted((Path(__file__).parent / "drafts").glob("*.attn"))]


def form(text: str) -> str:
    return formatted(SourceFile("a.attn", text))


def meaning(text: str) -> Tree[Token]:
    """Return the parse tree, with docstrings stripped of their indentation."""
    tree = _parse_tree(text + "\n")
    for node in tree.iter_subtrees():
        node.children = [
            Token("TEXT", inspect.cleandoc(str(child).strip('"'))) if getattr(child, "type", "") == "TEXT" else child
            for child in node.children
        ]
    return tree


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_our_own_files_are_formatted(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert form(text) == text, f"run attnc fmt {path.relative_to(ROOT)}"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_formatting_is_stable_and_keeps_the_meaning(path: Path) -> None:
    text = decode(path.read_bytes(), path.name).text
    once = form(text)
    assert form(once) == once
    assert meaning(once) == meaning(text)


MESSY = '''

# about this file
use windows(leading,shifted)
pattern  near ( window:int=128 ,tile : int[3]=[ 1,2 , 3] )
  """Keys that are near.

     More of it,
       further in.
  """
  # the input
  input gate:unit[batch,head,query]     # by the query


  branch a
        visible 0<=q-k<window   and not(k<-1 or k==+ 2)
        # inside of a
    # about b
  branch b
        over c=k//4
        score  scale*dot(q,mean(c . k))*(-1/2)+2*1/3 if q>3 else f (x [ 1 ],
   y,   # the second
          z)
        value mean(
          c.v
        )
  combine gate [ q ]*a+b
  #the end
# after
def half ( x )=x/2
'''

NEAT = '''# about this file
use windows (leading, shifted)

pattern near(window: int = 128, tile: int[3] = [1, 2, 3])
    """Keys that are near.

       More of it,
         further in.
    """
    # the input
    input   gate: unit[batch, head, query]  # by the query

    branch a
        visible 0 <= q - k < window and not (k < -1 or k == +2)
        # inside of a
    # about b
    branch b
        over    c = k // 4
        score   scale * dot(q, mean(c.k)) * (-1/2) + 2 * 1 / 3 if q > 3 else f(x[1],
                                                                               y,  # the second
                                                                               z)
        value   mean(
            c.v
        )
    combine gate[q] * a + b
    # the end

# after
def half(x) = x / 2
'''


def test_a_messy_text() -> None:
    assert form(MESSY) == NEAT
    assert form(NEAT) == NEAT


@given(st.sampled_from(OURS), st.integers(0, 1 << 30))
def test_blanks_do_not_matter(path: Path, seed: int) -> None:
    """Different numbers of blanks between words and at line ends give the same output."""
    made = random.Random(seed)
    text = path.read_text(encoding="utf-8")
    lines = []
    inside = False
    for line in text.split("\n"):
        inside ^= line.count('"""') == 1
        body = line.lstrip(" ")
        if not (inside or '"' in line or "#" in line):
            body = "".join(c if c != " " else " " * made.choice([1, 1, 2, 5]) for c in body)
            body += " " * made.choice([0, 0, 3])
        lines.append(line[: len(line) - len(line.lstrip(" "))] + body)
    assert form("\n".join(lines)) == form(text)


@pytest.mark.parametrize(
    "text", ["pattern p\n    visible k <\n", "visible k\n", "pattern p\n   visible k\n  score k\n"]
)
def test_texts_that_do_not_parse_are_refused(text: str) -> None:
    with pytest.raises(SpecError):
        form(text)


def test_many_comments_are_formatted_quickly() -> None:
    text = "# c\n" * 20_000 + "def f(x) = x\n" + "# d\n" * 20_000
    assert form(text) == text
