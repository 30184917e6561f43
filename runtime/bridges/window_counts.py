"""Convert the window sizes of other libraries to patterns.

Among the keys up to its own position, including its own, a query sees `window` keys in attnc's
`sliding_window(window=…)` and under Transformers' `sliding_window`, and left + 1 keys under FlashAttention's
`window_size = (left, right)`.
"""

from __future__ import annotations

from collections.abc import Sequence

from attnc.runtime.api.attention import Attention
from attnc.runtime.api.compile_attention import compile_attention
from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError

UNLIMITED = -1


def from_flash_window(window_size: Sequence[int], *, causal: bool = False) -> Attention:
    """Return FlashAttention's `window_size = (left, right)` as a pattern.

    A query sees its own key, `left` keys before and `right` keys after it; -1 means no limit. `causal` hides all keys
    after the query, whatever `right` is. The last query is aligned with the last key (bottom right), as in
    FlashAttention since 2.1; with more queries than keys, the first queries stand before key 0, and give 0 where they
    see nothing.

    Source: Dao-AILab/flash-attention, flash_attn_interface.py: keys between i + Nk - Nq - left and i + Nk - Nq + right,
    both included. Raises ArgumentTypeError, ArgumentError.
    """
    left, right = _ends(window_size)
    if not isinstance(causal, bool):
        raise ArgumentTypeError(f"causal is {causal!r}: it must be True or False")
    right = 0 if causal else right
    if right == 0:
        return (
            compile_attention("causal") if left == UNLIMITED else compile_attention("sliding_window", window=left + 1)
        )
    if left == right == UNLIMITED:
        return compile_attention("full")
    return compile_attention(_FLASH, left=left, right=right)


_FLASH = '''pattern flash_window(left: int, right: int)
    """FlashAttention's window: the query's own key, `left` before it and `right` after it; -1 is without limit."""
    align   end
    visible (left < 0 or q - k <= left) and (right < 0 or k - q <= right)
'''


def _ends(window_size: object) -> tuple[int, int]:
    if not isinstance(window_size, Sequence) or len(window_size) != 2:
        raise ArgumentTypeError(f"window_size is {window_size!r}: it must be two numbers, (left, right)")
    for number in window_size:
        if isinstance(number, bool) or not isinstance(number, int):
            raise ArgumentTypeError(f"window_size is {window_size!r}: it must be two whole numbers, (left, right)")
        if number < UNLIMITED:
            raise ArgumentError(f"window_size is {window_size!r}: each number must be at least 0, or -1 for no limit")
    return window_size[0], window_size[1]


def from_transformers_window(sliding_window: int | None, *, bidirectional: bool = False) -> Attention:
    """Return Transformers' `sliding_window` as a pattern.

    It is causal, with `sliding_window` keys including the query's own (None: no window), as
    `sliding_window(window=sliding_window)`: both require k > q - window. `bidirectional`, as in encoders, shows the
    keys at a distance of at most `sliding_window` on either side, 2 · sliding_window + 1 keys.

    Source: huggingface/transformers, masking_utils.py, `sliding_window_overlay` and
    `sliding_window_bidirectional_overlay`, 5.23.0. Raises ArgumentTypeError, ArgumentError.
    """
    if sliding_window is None:
        return compile_attention("full" if bidirectional else "causal")
    if isinstance(sliding_window, bool) or not isinstance(sliding_window, int):
        raise ArgumentTypeError(f"sliding_window is {sliding_window!r}: it must be a whole number, or None")
    minimum = 0 if bidirectional else 1
    if sliding_window < minimum:
        raise ArgumentError(f"sliding_window is {sliding_window}: it must be at least {minimum}")
    if bidirectional:
        return compile_attention(_FLASH, left=sliding_window, right=sliding_window)
    return compile_attention("sliding_window", window=sliding_window)
