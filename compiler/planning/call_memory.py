"""The memory of a call, in bytes."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1 << 10


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that a call keeps, and its peak beyond its arguments and results.

    `saved`: q, k, v, out and LSE, which the backward is given. `forward`, `backward`: beyond q, k and v, out and LSE;
    and beyond these, the gradient of out, and those of q, k and v. What is kept between calls (`SETTINGS`) is not in
    them, nor the gradient of the LSE, which takes another copy of all operands.
    """

    saved: int
    forward: int
    backward: int

    def __str__(self) -> str:
        return (
            f"saves {as_bytes(self.saved)}; takes {as_bytes(self.forward)} forward, {as_bytes(self.backward)} backward"
        )


def as_bytes(count: int) -> str:
    """Bytes in a unit that fits."""
    unit, name = next(
        (u, n) for u, n in ((KIB**3, "GiB"), (KIB**2, "MiB"), (KIB, "KiB"), (1, "B")) if count >= u or u == 1
    )
    return f"{count / unit:.3g} {name}" if unit > 1 else f"{count} B"
