"""All goals of the benchmarks."""

from __future__ import annotations

import goals_cpu
import goals_gpu
from goals import Goal

GOALS: tuple[Goal, ...] = (*goals_cpu.GOALS, *goals_gpu.GOALS)
"""The goals for a CPU, then the goals for a GPU."""
