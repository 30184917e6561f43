"""The syntax tree: its nodes and their positions."""

from __future__ import annotations

import time
from fractions import Fraction
from pathlib import Path
from typing import cast

import pytest

from attnc.spec import syntax
from attnc.spec.reading.parse import parse
from attnc.spec.reading.parser_tables import build_parser, grammar
from attnc.spec.reading.source_text import decode

DRAFTS = sorted((Path(__file__).parent / "drafts").glob("*.attn"))


def module(text: str) -> syntax.ModuleSyntax:
    return parse(decode(text, "example.attn"))


def body(lines: str, heading: str = "pattern p") -> syntax.Body:
    text = heading + "\n" + "".join(f"    {line}\n" for line in lines.splitlines())
    (item,) = module(text).items
    return cast(syntax.PatternDecl, item).body


def statement(line: str) -> syntax.Statement:
    (one,) = body(line).statements
    return one


def expression(text: str) -> syntax.Expr:
    return cast(syntax.ClauseStatement, statement(f"visible {text}")).value


def shown(node: object) -> str:  # noqa: C901 - one line a node
    """Return an expression in prefix form."""
    match node:
        case syntax.NameExpr():
            return node.id
        case syntax.NumberExpr() | syntax.BoolExpr():
            return str(node.value)
        case syntax.ListExpr():
            return f"[{' '.join(map(shown, node.items))}]"
        case syntax.UnaryExpr():
            return f"({node.op} {shown(node.operand)})"
        case syntax.BinaryExpr():
            return f"({node.op} {shown(node.left)} {shown(node.right)})"
        case syntax.ComparisonExpr():
            return f"(cmp {shown(node.first)} {' '.join(f'{op} {shown(x)}' for op, x in node.rest)})"
        case syntax.LogicExpr():
            return f"({node.op} {' '.join(map(shown, node.operands))})"
        case syntax.ConditionalExpr():
            return f"(if {shown(node.condition)} {shown(node.then)} {shown(node.otherwise)})"
        case syntax.AttributeExpr():
            return f"{shown(node.base)}.{node.name.id}"
        case syntax.IndexExpr():
            return f"{shown(node.base)}[{' '.join(map(shown, node.indices))}]"
        case syntax.CallExpr():
            return f"{shown(node.function)}({' '.join(map(shown, node.arguments))})"
        case syntax.CallArgument():
            return f"{node.name.id}={shown(node.value)}" if node.name else shown(node.value)
        case syntax.RangeExpr():
            return f"{shown(node.low)}..{shown(node.high)}"
        case syntax.LoopVariable():
            return f"{node.name.id}:{shown(node.domain)}" if node.domain else node.name.id
        case syntax.ForClause():
            condition = f" if {shown(node.condition)}" if node.condition else ""
            return f"for {' '.join(map(shown, node.runnings))}{condition}"
        case syntax.AggregateExpr():
            return f"{shown(node.function)}({shown(node.body)} {shown(node.each)})"
        case syntax.TypeExpr():
            return f"{node.name.id if node.name else ''}[{' '.join(map(shown, node.dims))}]"
        case syntax.AxisDecl():
            return f"{node.name.id}:{shown(node.domain)}"
        case syntax.UnitDecl():
            return f"{node.name.id}={shown(node.value)}"
    raise AssertionError(node)


@pytest.mark.parametrize("path", DRAFTS, ids=lambda path: path.stem)
def test_drafts_parse(path: Path) -> None:
    assert parse(decode(path.read_bytes(), path.name)).items


def test_drafts_exist() -> None:
    assert DRAFTS


def test_grammar_is_strict() -> None:
    build_parser(grammar(), strict=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a + b - c * d", "(- (+ a b) (* c d))"),
        ("a // b / c % d @ e", "(@ (% (/ (// a b) c) d) e)"),
        ("-a ** -b ** c", "(- (** a (- (** b c))))"),
        ("+a.b[c, d](e)", "(+ a.b[c d](e))"),
        ("0 <= q - k < w", "(cmp 0 <= (- q k) < w)"),
        ("q not in text and not k in text", "(and (cmp q not in text) (not (cmp k in text)))"),
        ("a or b and c or d", "(or a (and b c) d)"),
        ("(a or b) or c", "(or (or a b) c)"),
        ("a if b else c if d else e", "(if b a (if d c e))"),
        ("f()", "f()"),
        ("f(a, extra = b, c)", "f(a extra=b c)"),
        ("sum(a for b)", "sum(a for b)"),
        ("any(a for b in 0 .. n + 1, c in d if e or f)", "any(a for b:0..(+ n 1) c:d if (or e f))"),
        ("[a, [b]][0]", "[a [b]][0]"),
        ("true != false", "(cmp True != False)"),
        ("score > window", "(cmp score > window)"),
        ("nota and inner", "(and nota inner)"),
        ("visiblek", "visiblek"),
        ("(a\n  + b # why\n\n      )", "(+ a b)"),
    ],
)
def test_expressions(text: str, expected: str) -> None:
    assert shown(expression(text)) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("007", 7),
        ("0.1", Fraction(1, 10)),
        ("1.50", Fraction(3, 2)),
        ("1e3", Fraction(1000)),
        ("2.5e-3", Fraction(1, 400)),
        ("1E+2", Fraction(100)),
        ("9" * 40, 10**40 - 1),
    ],
)
def test_numbers_are_exact(text: str, value: int | Fraction) -> None:
    number = expression(text)
    assert isinstance(number, syntax.NumberExpr)
    assert number.value == value and type(number.value) is type(value)


def test_long_flat_chains_stay_flat() -> None:
    both = expression("q" + " and k" * 5_000)
    assert isinstance(both, syntax.LogicExpr) and len(both.operands) == 5_001
    chain = expression("q" + " <= k" * 5_000)
    assert isinstance(chain, syntax.ComparisonExpr) and len(chain.rest) == 5_000


def test_a_long_file_is_read_in_linear_time() -> None:
    text = "pattern p\n" + "    let a = q  # one\n" * 2_900
    begun = time.perf_counter()
    (pattern,) = module(text).items
    assert time.perf_counter() - begun < 10
    assert len(cast(syntax.PatternDecl, pattern).body.statements) == 2_900


def test_positions_of_expressions() -> None:
    def texts(node: syntax.Expr) -> list[str]:
        inner = [node.left, node.right] if isinstance(node, syntax.BinaryExpr) else []
        return [node.span.text, *(text for part in inner for text in texts(part))]

    assert texts(expression("(a + b) * c - d")) == [
        "(a + b) * c - d",
        "(a + b) * c",
        "a + b",
        "a",
        "b",
        "c",
        "d",
    ]
    assert expression("f(x)[0].y").span.text == "f(x)[0].y"
    assert expression("a if b else c").span.text == "a if b else c"
    assert expression("not  a").span.text == "not  a"


def test_positions_of_statements() -> None:
    lines = "let a = (1 + 2)  # three\ninput x: int[batch] = 0\ntokens t(i: n)\nper q, b = k // 2\nvisible q in t"
    spans = [s.span.text for s in body(lines).statements]
    assert spans == [
        "let a = (1 + 2)",
        "input x: int[batch] = 0",
        "tokens t(i: n)",
        "per q, b = k // 2",
        "visible q in t",
    ]
    assert [s.span.line for s in body(lines).statements] == [2, 3, 4, 5, 6]


def test_nodes_with_a_body_have_the_position_of_their_heading() -> None:
    text = "def f(x)\n    return x\n\npattern p(a: int = 1)\n    branch b[c in 0 .. n]\n        visible q == k\n"
    function, pattern = module(text).items
    assert function.span.text == "def f(x)"
    assert pattern.span.text == "pattern p(a: int = 1)"
    assert cast(syntax.PatternDecl, pattern).body.statements[0].span.text == "branch b[c in 0 .. n]"


def test_clause() -> None:
    clause = statement("score dot(q, k)")
    assert isinstance(clause, syntax.ClauseStatement)
    assert (clause.word.id, shown(clause.value)) == ("score", "dot(q k)")


@pytest.mark.parametrize(
    ("line", "names", "value"),
    [("let a = 1", None, "1"), ("let f(x, y) = x + y", ("x", "y"), "(+ x y)")],
)
def test_let(line: str, names: tuple[str, ...] | None, value: str) -> None:
    let = statement(line)
    assert isinstance(let, syntax.DefinitionDecl)
    assert let.word.id == "let" and let.each is None and shown(let.value) == value
    assert (None if let.parameters is None else tuple(p.id for p in let.parameters)) == names


def test_step() -> None:
    step = statement("step S = S + x[j] for j in 0 .. n")
    assert isinstance(step, syntax.DefinitionDecl)
    assert (step.word.id, step.name.id, step.parameters) == ("step", "S", None)
    assert shown(step.value) == "(+ S x[j])" and shown(step.each) == "for j:0..n"


@pytest.mark.parametrize(
    ("line", "kind", "default"),
    [
        ("input doc: int[batch, token]", "int[batch token]", None),
        ("input a: real = 0.5", "real[]", "1/2"),
        ("learned E: real[head, 2 * n + 1]", "real[head (+ (* 2 n) 1)]", None),
        ("state S: [dk, dv]", "[dk dv]", None),
        ("state z: complex[dk] = -inf", "complex[dk]", "(- inf)"),
    ],
)
def test_declaration(line: str, kind: str, default: str | None) -> None:
    one = statement(line)
    assert isinstance(one, syntax.Declaration)
    assert shown(one.type) == kind
    assert (one.default and shown(one.default)) == default


@pytest.mark.parametrize(
    ("line", "name", "binders"),
    [
        ("tokens y: height, x: width", None, ["y:height", "x:width"]),
        ("tokens video(t: frames, s: 3 * n)", "video", ["t:frames", "s:(* 3 n)"]),
        ("pad y: -h .. height + h", None, ["y:(- h)..(+ height h)"]),
        ("over b = k // block", None, ["b=(// k block)"]),
        ("over s in 0 .. n, phase in m", None, ["s:0..n", "phase:m"]),
        ("per q, c = [k.t, k.y]", None, ["q", "c=[k.t k.y]"]),
    ],
)
def test_tokens_lines(line: str, name: str | None, binders: list[str]) -> None:
    places = statement(line)
    assert isinstance(places, syntax.BinderClause)
    assert (places.name and places.name.id) == name
    assert [shown(b) for b in places.binders] == binders


def test_blocks() -> None:
    lines = "branch near\n    visible q == k\nselect s[c in 0 .. n, d]\n    keep rank < 1\nround\n    keep true"
    near, select, rounding = body(lines).statements
    assert isinstance(near, syntax.BlockStatement) and near.name and near.name.id == "near" and near.binders == ()
    assert isinstance(select, syntax.BlockStatement) and [shown(b) for b in select.binders] == ["c:0..n", "d"]
    assert isinstance(rounding, syntax.BlockStatement) and rounding.name is None and len(rounding.body.statements) == 1


def test_items() -> None:
    text = (
        '"""About."""\n\nuse windows (shifted, leading)\nlet n = 3\ndef f(x, y: int = 2) = x\n'
        "def g()\n    let a = 1\n    return a\n"
        "recurrence r\n    read q\npattern p(w: int[3] = [1, 2, 3], m)\n    visible true\n"
    )
    parsed = module(text)
    assert parsed.doc and parsed.doc.value == "About."
    use, let, f, g, r, p = parsed.items
    assert isinstance(use, syntax.UseDecl) and (use.module.id, [n.id for n in use.names]) == (
        "windows",
        ["shifted", "leading"],
    )
    assert isinstance(let, syntax.DefinitionDecl) and let.name.id == "n"
    assert isinstance(f, syntax.FunctionDecl) and isinstance(f.value, syntax.NameExpr) and len(f.parameters) == 2
    assert f.parameters[0].type is None and f.parameters[1].default is not None
    assert isinstance(g, syntax.FunctionDecl) and isinstance(g.value, syntax.Body) and g.parameters == ()
    assert isinstance(r, syntax.PatternDecl) and (r.word.id, r.name.id) == ("recurrence", "r")
    assert isinstance(p, syntax.PatternDecl) and p.word.id == "pattern"
    assert [shown(x.type) if x.type else None for x in p.parameters] == ["int[3]", None]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ('"""One line."""', "One line."),
        ('"One line."', "One line."),
        ('""', ""),
        ('"""First.\n\n      Indented.\n    Not.\n    """', "First.\n\n  Indented.\nNot."),
        ('"""A "quoted" word # and no comment."""', 'A "quoted" word # and no comment.'),
    ],
)
def test_docstrings(written: str, value: str) -> None:
    (pattern,) = module(f"pattern p\n    {written}\n    visible true\n").items
    doc = cast(syntax.PatternDecl, pattern).body.doc
    assert doc and doc.value == value


def test_a_body_may_be_a_docstring_alone() -> None:
    assert body('"""Everything."""').statements == ()


@pytest.mark.parametrize(
    "text",
    [
        "pattern p\n    visible true",
        "pattern p\n    visible true\n    ",
        "pattern p\n    visible true\n  # a comment anywhere\n",
        "# head\n\npattern p  # why\n# left\n\n        # right\n    visible true # end",
        "\n\n\npattern p\n  visible true\n",
    ],
)
def test_layout_without_meaning_is_free(text: str) -> None:
    (pattern,) = module(text).items
    assert len(cast(syntax.PatternDecl, pattern).body.statements) == 1


def test_words_are_reserved_only_at_the_start_of_a_line() -> None:
    names = (
        "score",
        "window",
        "from",
        "value",
        "read",
        "pattern",
        "use",
        "def",
        "let",
        "input",
        "over",
        "round",
        "state",
    )
    for name in names:
        assert shown(expression(f"{name} + f.{name}")) == f"(+ {name} f.{name})"
        assert isinstance(statement(f"let {name} = 1"), syntax.DefinitionDecl)
