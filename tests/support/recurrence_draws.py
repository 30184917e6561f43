"""Random inputs of recurrences, for both `reference.recurrences` and the compiler."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.scans import REFERENCES

DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "gate": F.logsigmoid,
    "fraction": torch.sigmoid,
    "positive": F.softplus,
    "negative": lambda x: -F.softplus(x),
    "unit": lambda x: F.normalize(x, dim=-1),
    "minus_unit": lambda x: -F.normalize(x, dim=-1),
    "flag": lambda x: x > 0.5,
}

# Each input as a kind of draw and its axes (n: steps, slots or the size of a complex state; L: levels), or a number.
INPUTS: dict[str, dict[str, str | int]] = {
    "document_linear": {"g": "gate BTH", "fresh": "flag BT"},
    "mamba2_ssd": {"g": "gate BTH", "dt": "positive BTH", "D": "normal H"},
    "gla": {"g": "gate BTHk"},
    "hgrn": {"f": "fraction BTHv"},
    "hgrn2": {"f": "fraction BTHk"},
    "rwkv6": {"g": "gate BTHk", "u": "normal Hk"},
    "gsa": {"g": "gate BTHn", "s": "normal BTHn"},
    "log_linear": {"g": "gate BTH", "level": "positive BTHL"},
    "delta_net": {"beta": "fraction BTH"},
    "gated_delta_net": {"g": "gate BTH", "beta": "fraction BTH"},
    "kimi_delta": {"g": "gate BTHk", "beta": "fraction BTH"},
    "comba": {"g": "gate BTH", "beta": "fraction BTH", "decay": "normal H", "D": "normal H"},
    "gated_delta_product": {"g": "gate BTH", "beta": "fraction BTHn", "ks": "unit BTHnk", "vs": "normal BTHnv"},
    "rwkv7": {"w": "fraction BTHk", "a": "minus_unit BTHk", "b": "fraction BTHk", "r_k": "normal Hk"},
    "mesa": {"g": "gate BTH", "beta": "fraction BTH", "ridge": "positive Hk"},
    "test_time_regression": {"beta": "fraction BTH"},
    "titans_linear": {"rate": "fraction BTH", "hold": "fraction BTH", "forget": "fraction BTH", "chunk": 3},
    "yaad_linear": {"rate": "fraction BTH", "hold": "fraction BTH", "delta": "positive BTH"},
    "moneta_linear": {"rate": "fraction BTH", "hold": "fraction BTH"},
    "memora_linear": {"rate": "fraction BTH", "hold": "fraction BTH"},
    "ttt_linear": {"rate": "fraction BTH", "gain": "normal Hv", "shift": "normal Hv", "chunk": 3},
    "s5": {
        **{"L_re": "negative Hn", "L_im": "normal Hn", "dt": "positive Hn", "B_re": "normal Hnv", "B_im": "normal Hnv"},
        **{"C_re": "normal Hvn", "C_im": "normal Hvn", "D": "normal Hv"},
    },
    "convs5_pointwise": {
        **{"L_re": "negative Hn", "L_im": "normal Hn", "dt": "positive Hn"},
        **{"C_re": "normal Hvn", "C_im": "normal Hvn", "u_re": "normal BTHn", "u_im": "normal BTHn"},
    },
    "aaren": {"w": "normal Hk"},
    "mamba1": {"dt": "positive BTHv", "A": "negative Hkv", "D": "normal Hv"},
    "hybrid_window_linear": {"g": "gate BTH", "gate": "fraction BTH", "window": 3},
    "mhs_vm": {"dt": "positive BTHv", "A": "negative Hkv"},
    "spatial_mamba": {"dt": "positive BTHv", "A": "negative Hkv", "mix": "normal H333", "D": "normal Hv"},
    "mamba_mixer": {
        **{"dt": "positive BTHv", "dt_back": "positive BTHv", "A": "negative Hkv", "A_back": "negative Hkv"},
        **{"D": "normal Hv"},
    },
    "lingen_ma": {"g": "gate BTH", "layer": 1, "reviews": 2},
}
GRIDS = {
    "mhs_vm": ("height", "width"),
    "spatial_mamba": ("height", "width"),
    "lingen_ma": ("frames", "height", "width"),
}
UNIT_KEYS = (
    *("delta_net", "gated_delta_net", "kimi_delta", "comba", "gated_delta_product", "mesa", "test_time_regression"),
    *("titans_linear", "yaad_linear", "moneta_linear", "memora_linear", "ttt_linear"),
)


def example(
    name: str,
    B: int = 2,
    H: int = 2,
    T: int = 7,
    dk: int = 4,
    dv: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    n: int = 3,
    grid: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Return the random operands of a system: q, k, v and its inputs by name.

    n: Householder steps, slots or the size of a complex state. grid: (height, width) or (frames, height, width) of the
    systems on one, whose T follows from it.
    """
    assert name in REFERENCES, name
    generator = torch.Generator().manual_seed(seed)
    described = dict(INPUTS.get(name, {}))
    if name in GRIDS:
        described |= dict(zip(GRIDS[name], grid or (2, 3, 4)[-len(GRIDS[name]) :], strict=True))
        T = math.prod(int(described[axis]) for axis in GRIDS[name]) + int(described.get("reviews", 0))
    sizes = {"B": B, "H": H, "T": T, "k": dk, "v": dv, "n": n, "L": max(T - 1, 0).bit_length() + 1, "3": 3}

    def draw(kind: str, axes: str) -> Tensor:
        drawn = DRAWS[kind](torch.randn([sizes[axis] for axis in axes], generator=generator, dtype=torch.float64))
        return drawn if drawn.dtype == torch.bool else drawn.to(dtype)

    q, k, v = draw("normal", "BHTk"), draw("unit" if name in UNIT_KEYS else "normal", "BHTk"), draw("normal", "BHTv")
    inputs = {key: value if isinstance(value, int) else draw(*value.split()) for key, value in described.items()}
    if name == "rwkv7":
        inputs["b"] = -inputs["a"] * inputs["b"]
    return q, k, v, inputs
