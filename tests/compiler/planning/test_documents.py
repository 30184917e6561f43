"""Windows of documents partition the tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnc.compiler.lowering.specialise import Window
from attnc.compiler.planning.documents import DocumentsNotContiguousError, document_windows, whole


def test_a_single_document() -> None:
    assert whole(3, 5, "end") == Window(0, 0, 3, 5, 2)
    assert whole(3, 5, "start") == Window(0, 0, 3, 5, 0)
    assert whole(5, 5, None) == Window(0, 0, 5, 5, 0)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.integers(0, 99),
    st.sampled_from(["start", "end"]),
    st.integers(0, 99),
)
def test_windows(lengths: list[int], cut: int, align: str, seed: int) -> None:
    """Every row lies in the window of its document, at its position within the document."""
    names = np.random.default_rng(seed).permutation(len(lengths)) - 3
    ids = np.repeat(names, lengths)
    n_k = len(ids)
    n_q = n_k - cut % n_k
    offset = n_k - n_q if align == "end" else 0
    rows: list[tuple[int, int, int]] = []
    for w in document_windows(ids, n_q, "end" if align == "end" else "start"):
        assert len(set(ids[w.key : w.key + w.n_k].tolist())) == 1
        assert (w.key == 0 or ids[w.key - 1] != ids[w.key]) and (
            w.key + w.n_k == n_k or ids[w.key + w.n_k] != ids[w.key]
        )
        rows += [(w.row + r, w.key, r + w.shift) for r in range(w.n_q)]
    starts = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    assert rows == [(r, int(starts[r + offset]), r + offset - int(starts[r + offset])) for r in range(n_q)]


def test_no_tokens() -> None:
    assert len(document_windows(np.zeros(0, dtype=np.int64), 0, "end")) == 0


def test_an_id_in_two_runs_is_refused() -> None:
    with pytest.raises(DocumentsNotContiguousError, match="document 4 appears again at position 5") as caught:
        document_windows(np.array([4, 4, 7, 7, 7, 4]), 6, "end")
    assert (caught.value.identity, caught.value.position) == (4, 5)
