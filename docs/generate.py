"""Write what the documents take from the code: the pictures, and `library.md`.

python docs/generate.py            write them
python docs/generate.py --check    only say which are not current; exit status 1 if any is
"""

from __future__ import annotations

import sys
from pathlib import Path

from attnc import compile_attention
from attnc.runtime.library import library_files, library_names

DOCS = Path(__file__).parent

DRAWN: dict[str, tuple[int, dict[str, object]]] = {
    "blocked": (60, {"block": 16}),
    "sliding_window": (64, {"window": 16, "sinks": 2}),
}
"""Length and parameters of a picture, where the defaults would show little."""

LENGTH = 64

HEAD = """# The library

Every pattern by name: `compile_attention("sliding_window", window=512)`. The pictures are drawn by
`attnc show NAME -o FILE.svg` with the parameters and length that each says; inputs are examples, named in it.

<!-- Written by `python docs/generate.py` from stdlib_patterns/*.attn; do not edit. -->
"""


def pictures() -> dict[str, str]:
    """Each SVG by its path below docs/."""
    drawn = {}
    for name in library_names():
        length, parameters = DRAWN.get(name, (LENGTH, {}))
        drawn[f"pictures/{name}.svg"] = compile_attention(name, **parameters).picture(length)  # type: ignore[arg-type]
    return drawn


def library_page() -> str:
    """`library.md`: a section a pattern, then the modules of definitions."""
    files = library_files()
    parts = [HEAD]
    for name in library_names():
        parts.append(f"## {name}\n\n```attn\n{files[name].read_text(encoding='utf-8')}```\n")
        parts.append(f"![{name}: who sees whom](pictures/{name}.svg)\n")
    modules = [name for name in files if name not in library_names()]
    if modules:
        parts.append("## Modules\n\nDefinitions for other patterns, brought in by `use`.\n")
    for name in modules:
        parts.append(f"### {name}\n\n```attn\n{files[name].read_text(encoding='utf-8')}```\n")
    return "\n".join(parts)


def generated() -> dict[Path, str]:
    """Every generated file and what it should hold."""
    return {DOCS / path: text for path, text in {**pictures(), "library.md": library_page()}.items()}


def stale() -> list[Path]:
    """The generated files that are missing or do not hold what they should, and pictures of nothing."""
    wanted = generated()
    wrong = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    return wrong + [path for path in sorted((DOCS / "pictures").glob("*.svg")) if path not in wanted]


def main(arguments: list[str]) -> int:
    """Write, or check."""
    if arguments == ["--check"]:
        for path in (wrong := stale()):
            print(f"not current: {path}; run python docs/generate.py", file=sys.stderr)
        return int(bool(wrong))
    if arguments:
        print(__doc__, file=sys.stderr)
        return 2
    for path, text in generated().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
