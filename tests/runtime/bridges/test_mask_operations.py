"""The integer operations from which mask_mod is built, on numbers where they easily go wrong."""

from __future__ import annotations

import math

import torch

from attnc.runtime.executors.flex import torch_tape


def numbers() -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    edges = [2**i + d for i in range(1, 62) for d in (-1, 0, 1)]
    wide = [torch.randint(2**bits, (2000,), generator=draw) for bits in (20, 41, 52, 62)]
    return torch.cat([torch.arange(3000), torch.tensor(edges), *wide])


def test_bit_lengths() -> None:
    n = numbers()
    assert torch_tape._bit_length(n).tolist() == [x.bit_length() for x in n.tolist()]


def test_roots() -> None:
    near = torch.tensor([i * i + d for i in (2**20 + 3, 2**26 + 1, 2**27 - 1, 2**30 + 7) for d in (-1, 0, 1)])
    n = torch.cat([numbers(), near])
    assert torch_tape._root(n).tolist() == [math.isqrt(x) for x in n.tolist()]


def test_powers() -> None:
    assert torch_tape._power(2, torch.arange(63)).tolist() == [2**i for i in range(63)]
    bases, exponents = [3, -3, 0, 0, -1, -1, 1, 7], [39, 39, 0, 70, 70, 71, 1 << 40, 22]
    powers = torch_tape._power(torch.tensor(bases), torch.tensor(exponents))
    assert powers.tolist() == [3**39, -(3**39), 1, 0, 1, -1, 1, 7**22]


def test_division_rounds_down() -> None:
    a, b = (x.reshape(-1) for x in torch.meshgrid(torch.arange(-7, 8), torch.arange(-7, 8), indexing="ij"))
    pairs = [(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True) if y]
    keep = b != 0
    assert torch_tape._floor_divided(a, b)[keep].tolist() == [x // y for x, y in pairs]
    assert torch_tape._remainder(a, b)[keep].tolist() == [x % y for x, y in pairs]
    assert torch_tape._floor_divided(a, 3).tolist() == [x // 3 for x in a.tolist()]
    assert torch_tape._remainder(5, b)[keep].tolist() == [5 % y for _, y in pairs]
