"""The memory of a call in bytes."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1 << 10


@dataclass(frozen=True, slots=True)
class Memory:
    """The bytes that a call saves, and the peaks of its forward and backward beyond arguments and results.

    `saved`: q, k, v, out and LSE, which are saved for the backward. `forward`: the peak beyond q, k, v, out and LSE.
    `backward`: the peak beyond these, the gradient of out, and the gradients of q, k and v. Excluded are memory kept
    between calls (`SETTINGS`) and a gradient of the LSE, which takes another copy of all operands.
    """

    saved: int
    forward: int
    backward: int

    def __str__(self) -> str:
        return (
            f"saves {as_bytes(self.saved)}; takes {as_bytes(self.forward)} forward, {as_bytes(self.backward)} backward"
        )


def as_bytes(count: int) -> str:
    """Return a number of bytes as text in the largest unit that fits."""
    unit, name = next(
        (u, n) for u, n in ((KIB**3, "GiB"), (KIB**2, "MiB"), (KIB, "KiB"), (1, "B")) if count >= u or u == 1
    )
    return f"{count / unit:.3g} {name}" if unit > 1 else f"{count} B"
