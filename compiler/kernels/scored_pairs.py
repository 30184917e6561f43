"""Scores of a pattern's own: the formula of every pair, the terms that it reads, and their gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attnc.compiler import fold
from attnc.compiler.derivatives import Derivative
from attnc.compiler.ir import Element, Truth, Value
from attnc.compiler.kernels.attention_problem import PAIRS, PRODUCT
from attnc.compiler.kernels.index_text import COLUMNS, ROWS, ExprText
from attnc.compiler.kernels.inputs import address
from attnc.compiler.kernels.loads import Loads
from attnc.compiler.kernels.score_formula import Term
from attnc.compiler.kernels.value_text import LN_2, LOG2_E
from attnc.compiler.value_nodes import scale


@dataclass
class Scored(Loads):
    """Writes scores."""

    @property
    def rows_of(self) -> tuple[str, ...]:
        """Numbers of every query of a head, in fp32, one after another."""
        return {"softmax": ("lse", "delta"), "share": ("share", "delta"), "sum": ()}[self.problem.kind]

    @property
    def has_product(self) -> bool:
        """Whether vectors are multiplied for a score."""
        return self.problem.score is None or self.problem.score.has_product

    def weighed(self, of_query: Mapping[str, str], partial: bool) -> None:
        """`weight` of a tile from its products, as the forward had it; `of_query`: the numbers of its queries."""
        self.scored(partial)
        if self.problem.kind == "softmax":
            self.lines.add(f"weight = tl.exp2(score * {self.factor} - {of_query['lse']})")
        elif self.problem.kind == "share":
            self.lines.add(f"weight = score * {of_query['share']}")
        else:
            self.lines.add("weight = score")
        if partial:
            self.lines.add("weight = tl.where(visible, weight, 0.0)")

    def changed(self, of_query: Mapping[str, str], partial: bool) -> None:
        """`change`: how the result changes with the formula of a tile, from how it does with the weights."""
        if self.problem.kind == "softmax":
            self.lines.add(f"change = weight * (change - {of_query['delta']})")
            return
        if self.problem.kind == "share":
            self.lines.add(f"change = (change - {of_query['delta']}) * {of_query['share']}")
        if partial:
            self.lines.add("change = tl.where(visible, change, 0.0)")

    def given(self) -> list[Term]:
        """The terms that the kernel reads."""
        score = self.problem.score
        return [] if score is None else list(score.terms)

    def summed(self) -> list[Term]:
        """The terms whose gradients the kernel adds up."""
        score = self.problem.score
        if score is None:
            return []
        own = (term for term in self.given() if term.varies and term.side == self.stationary)
        return [term for term in own if not score.shifts_rows(term)]

    def gradients(self) -> list[str]:
        """The gradients of terms that the kernel writes, (batch, head, token)."""
        return [f"d{term.tensor.name}" for term in self.summed()]

    def atoms(self) -> dict[Value, ExprText]:
        """The texts of the leaves of a score's formula."""
        if self.problem.score is None:
            return {}
        names: dict[Value, ExprText] = {PRODUCT: ExprText("product", PAIRS), scale(): ExprText("scale")}
        for term in self.problem.score.terms:
            axes = PAIRS if term.side == "distance" else ROWS if term.side == self.stationary else COLUMNS
            names[term.element] = ExprText(term.tensor.name + ("_own" if axes == ROWS else "_of"), axes)
        return names

    def element_text(self, node: Element, indices: tuple[ExprText, ...]) -> ExprText:
        """An element of a real input, read pair by pair."""
        where, axes = address(node.tensor, indices, self.of_place)
        return ExprText(f"tl.load({where}{self.left_out(axes)}).to(tl.float32)", axes)

    def load_terms(self, side: str, inside: str, place: str, suffix: str) -> None:
        """Load the terms of a side."""
        for term in self.given():
            if term.side == side:
                name = term.tensor.name
                where = f"{name} + batch * {name}_0 + head * {name}_1 + {place}"
                mask = f", mask={inside}, other=0.0" if inside else ""
                self.lines.add(f"{name}_{suffix} = tl.load({where}{mask})")

    def moving_terms(self, partial: bool) -> None:
        """Load the terms of a tile's columns, and of its pairs."""
        sides = self.sides
        other = "key" if self.stationary == "query" else "query"
        self.load_terms(other, self.inside() if partial else "", sides.column, "of")
        for term in self.given():
            if term.side == "distance":
                name = term.tensor.name
                gap = self.texts.of(fold.sub(fold.place("q"), fold.place("k")))
                where = f"{name} + batch * {name}_0 + head * {name}_1 + ({gap.text} + distances)"
                mask = ", mask=visible, other=0.0" if partial else ""
                self.lines.add(f"{name}_of = tl.load({where}{mask})")

    def scored(self, partial: bool, formula: bool = True) -> None:
        """`score` of a tile from `product`, in natural logarithms; of the plain score it is the product.

        `formula`: the score itself is needed, besides what it is made of.
        """
        if self.problem.score is None:
            return
        self.is_partial = partial
        self.values.forget()
        if not formula:
            return
        found = self.values.of(self.problem.score.formula)
        if self.has_product:
            self.lines.add(f"score = {found.over(PAIRS).text}")
        else:
            sides = f"{self.sides.row_tile}, {self.sides.column_tile}"
            self.lines.add(f"score = tl.zeros(({sides}), tl.float32) + {found.over(PAIRS).at(6)}")

    @property
    def product_name(self) -> str:
        """The name of a tile's product."""
        return "score" if self.problem.score is None else "product"

    @property
    def factor(self) -> str:
        """The factor that turns a score into an exponent of 2."""
        return "scale" if self.problem.score is None else repr(LOG2_E)

    def slope(self, change: str, partial: bool) -> str:
        """The change of the product from that of the score, but for a factor that all pairs share (`shared_factor`)."""
        score = self.problem.score
        if score is None or self.shared_factor is not None:
            return change
        found = score.by_product
        if found is None:
            self.lines.add(f"pushed = tl.zeros_like({change})")
        else:
            self.lines.add(f"pushed = {self.pushed(found, change, partial)}")
        return "pushed"

    @property
    def shared_factor(self) -> str | None:
        """The factor from a score's gradient to its product's, None where pairs differ."""
        score = self.problem.score
        if score is None:
            return f"(scale * {LN_2})"
        found = score.by_product
        if found is None or found.where is not fold.truth(True):
            return None
        text = self.values.of(found.by)
        return None if text.axes else text.at(8)

    def pushed(self, found: Derivative, change: str, partial: bool) -> str:
        """Return the gradient of a part from the gradient of the score."""
        by = self.values.of(found.by)
        text = change if by.text == "1.0" else f"{change} * {by.over(PAIRS).at(8)}"
        tests = ["visible"] if partial else []
        if not isinstance(found.where, Truth):
            tests.append(self.values.truth(found.where).over(PAIRS).at(6))
        return f"tl.where({' & '.join(tests)}, {text}, 0.0)" if tests else text

    @property
    def sums_pairs(self) -> bool:
        """Whether gradients of terms are added up pair by pair, and rows of pairs at the end: small tiles allow it."""
        return False

    def zero_gradients(self) -> None:
        """Set the sums of the gradients of terms to zero."""
        sides = f"{self.sides.row_tile}, {self.sides.column_tile}" if self.sums_pairs else f"{self.sides.row_tile},"
        for name in self.gradients():
            self.lines.add(f"{name}_sum = tl.zeros(({sides}), tl.float32)")

    def add_gradients(self, change: str, partial: bool) -> None:
        """Add a tile to the gradients of terms."""
        score = self.problem.score
        for term in self.summed():
            assert score is not None
            derivative = score.by_term(term)
            if derivative is not None:
                name, pushed = f"d{term.tensor.name}_sum", self.pushed(derivative, change, partial)
                self.lines.add(f"{name} += {pushed}" if self.sums_pairs else f"{name} += tl.sum({pushed}, 1)")

    def store_gradients(self, rows: str) -> None:
        """Write the gradients of terms of a head."""
        for name in self.gradients():
            where = f"(batch * heads + head).to(tl.int64) * {rows} + row"
            found = f"tl.sum({name}_sum, 1)" if self.sums_pairs else f"{name}_sum"
            self.lines.add(f"tl.store({name} + {where}, {found}, mask=there)")
