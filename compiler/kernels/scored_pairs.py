"""Scores that a pattern states: the formula of every pair, the terms that it reads, and their gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attnc.compiler.ir import Element, Truth, Value, fold
from attnc.compiler.ir.derivatives import Derivative
from attnc.compiler.ir.value_nodes import scale
from attnc.compiler.kernels.attention_problem import PAIRS, PRODUCT
from attnc.compiler.kernels.index_text import COLUMNS, ROWS, ExprText
from attnc.compiler.kernels.inputs import address
from attnc.compiler.kernels.loads import Loads
from attnc.compiler.kernels.score_formula import Term
from attnc.compiler.kernels.value_text import LN_2, LOG2_E


@dataclass
class Scored(Loads):
    """The part of a kernel text that computes scores, weights and their gradients."""

    @property
    def row_numbers(self) -> tuple[str, ...]:
        """The fp32 numbers of every query that the kernel reads, (batch, heads, queries)."""
        return {"softmax": ("lse", "delta"), "share": ("share", "delta"), "sum": ()}[self.problem.kind]

    @property
    def has_product(self) -> bool:
        """Whether the score multiplies vectors."""
        return self.problem.score is None or self.problem.score.has_product

    def recompute_weight(self, query_texts: Mapping[str, str], partial: bool) -> None:
        """Emit the `weight` of a tile from its products, as in the forward; `query_texts`: numbers of its queries."""
        self.emit_score(partial)
        if self.problem.kind == "softmax":
            self.lines.add(f"weight = tl.exp2(score * {self.factor} - {query_texts['lse']})")
        elif self.problem.kind == "share":
            self.lines.add(f"weight = score * {query_texts['share']}")
        else:
            self.lines.add("weight = score")
        if partial:
            self.lines.add("weight = tl.where(visible, weight, 0.0)")

    def emit_formula_gradient(self, query_texts: Mapping[str, str], partial: bool) -> None:
        """Emit the gradient `change` of a tile's formula from the gradient of its weights, also named `change`."""
        if self.problem.kind == "softmax":
            self.lines.add(f"change = weight * (change - {query_texts['delta']})")
            return
        if self.problem.kind == "share":
            self.lines.add(f"change = (change - {query_texts['delta']}) * {query_texts['share']}")
        if partial:
            self.lines.add("change = tl.where(visible, change, 0.0)")

    def read_terms(self) -> list[Term]:
        """Return the terms that the kernel reads."""
        score = self.problem.score
        return [] if score is None else list(score.terms)

    def summed_terms(self) -> list[Term]:
        """Return the terms whose gradients the kernel sums."""
        score = self.problem.score
        if score is None:
            return []
        own_terms = (term for term in self.read_terms() if term.varies and term.side == self.stationary)
        return [term for term in own_terms if not score.shifts_rows(term)]

    def gradients(self) -> list[str]:
        """Return the names of the term gradients that the kernel writes, (batch, heads, tokens)."""
        return [f"d{term.tensor.name}" for term in self.summed_terms()]

    def atoms(self) -> dict[Value, ExprText]:
        """Return the texts of the leaves of the score's formula."""
        if self.problem.score is None:
            return {}
        names: dict[Value, ExprText] = {PRODUCT: ExprText("product", PAIRS), scale(): ExprText("scale")}
        for term in self.problem.score.terms:
            axes = PAIRS if term.side == "distance" else ROWS if term.side == self.stationary else COLUMNS
            names[term.element] = ExprText(term.tensor.name + ("_own" if axes == ROWS else "_of"), axes)
        return names

    def element_text(self, node: Element, indices: tuple[ExprText, ...]) -> ExprText:
        """Return the text of an element of a real input that is read pair by pair."""
        where, axes = address(node.tensor, indices, self.call_index)
        return ExprText(f"tl.load({where}{self.load_mask(axes)}).to(tl.float32)", axes)

    def load_terms(self, side: str, inside: str, token: str, suffix: str) -> None:
        """Emit the loads of the terms of a side."""
        for term in self.read_terms():
            if term.side == side:
                name = term.tensor.name
                where = f"{name} + batch * {name}_0 + head * {name}_1 + {token}"
                mask = f", mask={inside}, other=0.0" if inside else ""
                self.lines.add(f"{name}_{suffix} = tl.load({where}{mask})")

    def moving_terms(self, partial: bool) -> None:
        """Emit the loads of the terms of a tile's columns and of its pairs."""
        sides = self.sides
        other = "key" if self.stationary == "query" else "query"
        self.load_terms(other, self.inside() if partial else "", sides.column, "of")
        for term in self.read_terms():
            if term.side == "distance":
                name = term.tensor.name
                gap = self.texts.of(fold.sub(fold.place("q"), fold.place("k")))
                where = f"{name} + batch * {name}_0 + head * {name}_1 + ({gap.text} + distances)"
                mask = ", mask=visible, other=0.0" if partial else ""
                self.lines.add(f"{name}_of = tl.load({where}{mask})")

    def emit_score(self, partial: bool, formula: bool = True) -> None:
        """Emit the `score` of a tile from `product`, in natural logarithms; the plain score is the product itself.

        `formula`: the kernel needs the score, not only the numbers that the score reads.
        """
        if self.problem.score is None:
            return
        self.is_partial = partial
        self.values.forget()
        if not formula:
            return
        text = self.values.of(self.problem.score.formula)
        if self.has_product:
            self.lines.add(f"score = {text.over(PAIRS).text}")
        else:
            sides = f"{self.sides.row_tile}, {self.sides.column_tile}"
            self.lines.add(f"score = tl.zeros(({sides}), tl.float32) + {text.over(PAIRS).at(6)}")

    @property
    def product_name(self) -> str:
        """The name of a tile's product."""
        return "score" if self.problem.score is None else "product"

    @property
    def factor(self) -> str:
        """The factor that turns a score into an exponent of 2."""
        return "scale" if self.problem.score is None else repr(LOG2_E)

    def product_gradient(self, change: str, partial: bool) -> str:
        """Return the product's gradient from the score's, without a factor that all pairs share (`shared_factor`)."""
        score = self.problem.score
        if score is None or self.shared_factor is not None:
            return change
        derivative = score.by_product
        if derivative is None:
            self.lines.add(f"pushed = tl.zeros_like({change})")
        else:
            self.lines.add(f"pushed = {self.atom_gradient(derivative, change, partial)}")
        return "pushed"

    @property
    def shared_factor(self) -> str | None:
        """The factor from the score's gradient to the product's; None if it differs between pairs."""
        score = self.problem.score
        if score is None:
            return f"(scale * {LN_2})"
        derivative = score.by_product
        if derivative is None or derivative.where is not fold.truth(True):
            return None
        factor = self.values.of(derivative.by)
        return None if factor.axes else factor.at(8)

    def atom_gradient(self, derivative: Derivative, change: str, partial: bool) -> str:
        """Return the gradient of an atom of the formula from the gradient of the score, as text."""
        rate = self.values.of(derivative.by)
        text = change if rate.text == "1.0" else f"{change} * {rate.over(PAIRS).at(8)}"
        tests = ["visible"] if partial else []
        if not isinstance(derivative.where, Truth):
            tests.append(self.values.truth(derivative.where).over(PAIRS).at(6))
        return f"tl.where({' & '.join(tests)}, {text}, 0.0)" if tests else text

    @property
    def sums_pairs(self) -> bool:
        """Whether term gradients are summed pair by pair, and over rows only at the end, as small tiles allow."""
        return False

    def zero_gradients(self) -> None:
        """Emit sums of zero for the gradients of terms."""
        sides = f"{self.sides.row_tile}, {self.sides.column_tile}" if self.sums_pairs else f"{self.sides.row_tile},"
        for name in self.gradients():
            self.lines.add(f"{name}_sum = tl.zeros(({sides}), tl.float32)")

    def add_gradients(self, change: str, partial: bool) -> None:
        """Emit the addition of a tile to the gradients of terms."""
        score = self.problem.score
        for term in self.summed_terms():
            assert score is not None
            derivative = score.by_term(term)
            if derivative is not None:
                name, pushed = f"d{term.tensor.name}_sum", self.atom_gradient(derivative, change, partial)
                self.lines.add(f"{name} += {pushed}" if self.sums_pairs else f"{name} += tl.sum({pushed}, 1)")

    def store_gradients(self, rows: str) -> None:
        """Emit the stores of the term gradients of a head."""
        for name in self.gradients():
            where = f"(batch * heads + head).to(tl.int64) * {rows} + row"
            gradient = f"tl.sum({name}_sum, 1)" if self.sums_pairs else f"{name}_sum"
            self.lines.add(f"tl.store({name} + {where}, {gradient}, mask=there)")
