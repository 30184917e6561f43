"""A hook of mkdocs: publish README.md, docs/ and every file of the repository that they link to.

Pages keep their paths in the repository as source names, so that a link between two Markdown files works unchanged in
a checkout and on the site. `make docs` builds the site; `mkdocs.yml` names this file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import File, Files
    from pygments.lexer import RegexLexer

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?P<open>\]\()(?P<target>[^)#\s]+)")
CODE = re.compile(r"`[^`\n]+`")


def linked(page: Path) -> Iterator[Path]:
    """Return the paths in the repository that a Markdown file links to."""
    for link in LINK.finditer(FENCE.sub("", page.read_text(encoding="utf-8"))):
        target = (page.parent / link["target"]).resolve()
        if "://" not in link["target"] and target.exists() and target.is_relative_to(ROOT):
            yield target


def published() -> list[Path]:
    """Return README.md, the pages and pictures of docs/, and whatever one of these pages links to."""
    paths: dict[Path, None] = {}
    waiting = [ROOT / "README.md", *sorted(DOCS.rglob("*.md")), *sorted(DOCS.rglob("*.svg"))]
    while waiting:
        path = waiting.pop(0)
        if path not in paths:
            paths[path] = None
            waiting += linked(path) if path.suffix == ".md" else ()
    return list(paths)


def listing(folder: Path) -> str:
    """Return a page that shows every file of a folder."""
    parts = [f"# {folder.relative_to(ROOT).as_posix()}/\n"]
    for path in sorted(folder.iterdir()):
        if path.is_file():
            language = {".py": "python"}.get(path.suffix, path.suffix.lstrip("."))
            parts.append(f"## {path.name}\n\n```{language}\n{path.read_text(encoding='utf-8').rstrip()}\n```\n")
    return "\n".join(parts)


def site_file(path: Path, config: MkDocsConfig) -> File:
    """Return what mkdocs publishes for a file or folder of the repository."""
    from mkdocs.structure.files import File

    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        return File.generated(config, f"{name}/index.md", content=listing(path))
    file = File(name, str(ROOT), config.site_dir, config.use_directory_urls)
    file.dest_uri = file.dest_uri.removeprefix("docs/")
    if path.suffix not in {".md", ".svg", ".json"}:
        file.dest_uri += ".txt"  # browsers download files of unknown types instead of showing them
    return file


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Publish by paths in the repository; of docs/ only the style sheet keeps its path below docs/."""
    for file in list(files):
        if file.src_dir and Path(file.src_dir) == DOCS and not file.src_uri.startswith("assets/"):
            files.remove(file)
    for path in published():
        files.append(site_file(path, config))
    return files


def fence(block: re.Match[str]) -> str:
    """Return a code block whose first line Python-Markdown reads: a file name after `attn` becomes a title."""
    language, *words = block["info"].split() or [""]
    file = [word for word in words if "." in word]
    wrong = [f"error {code}" for word, code in pairwise(words) if word == "error"]
    title = f' title="{": ".join(file + wrong)}"' if file + wrong else ""
    return f"```{language or 'text'}{title}\n{block['text']}```"


def on_page_markdown(markdown: str, /, *, page: Any, **_: object) -> str:
    """Return a page's text in the dialect of Python-Markdown."""
    source = ROOT / page.file.src_uri
    if page.parent is None:
        page.meta.setdefault("hide", []).append("navigation")  # the sidebar would list only this page

    def folder(link: re.Match[str]) -> str:
        target = link["target"]
        is_folder = "://" not in target and (source.parent / target).is_dir()
        return f"{link['open']}{target.rstrip('/')}/index.md" if is_folder else link[0]

    def prose(text: str) -> str:
        lines = LINK.sub(folder, text).splitlines(keepends=True)
        # GitHub shows `a \| b` in a table as a | b; Python-Markdown keeps the backslash.
        rows = [CODE.sub(lambda code: code[0].replace("\\|", "|"), x) if x.startswith("|") else x for x in lines]
        return "".join(rows)

    parts, end = [], 0
    for block in FENCE.finditer(markdown):
        parts += [prose(markdown[end : block.start()]), fence(block)]
        end = block.end()
    return "".join([*parts, prose(markdown[end:])])


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Register the language of `.attn` files with Pygments, which looks for lexers only in packages."""
    import pygments.lexers

    lexer = attn_lexer()
    pygments.lexers.LEXERS[lexer.__name__] = ("", lexer.name, tuple(lexer.aliases), (), ())
    pygments.lexers._lexer_cache[lexer.name] = lexer
    return config


def attn_lexer() -> type[RegexLexer]:
    """Return a Pygments lexer of the pattern language."""
    from pygments.lexer import RegexLexer, words
    from pygments.token import Comment, Keyword, Number, Operator, Punctuation, String, Text, Whitespace

    from attnc.spec.reading.phrases import RESERVED, STATEMENT_WORDS

    class AttnLexer(RegexLexer):
        name = "attn"
        aliases = ("attn",)
        tokens = {  # noqa: RUF012 – Pygments declares it so
            "root": [
                (r'"""(?s:.*?)"""', String.Doc),
                (r"#.*", Comment),
                (rf"^([ \t]*)({'|'.join(sorted(STATEMENT_WORDS))})\b", Keyword.Declaration),
                (words(sorted(RESERVED), prefix=r"\b", suffix=r"\b"), Keyword),
                (r"\d+(\.\d+)?([eE][+-]?\d+)?", Number),
                (r"[^\W\d]\w*", Text),
                (r"[-+*/%<>=!@|&^~]+", Operator),
                (r"\n", Whitespace),
                (r"[ \t]+", Whitespace),
                (r".", Punctuation),
            ]
        }

    return AttnLexer
