"""The goals for a GPU: every target of PERFORMANCE 8, G1a to G8."""

from __future__ import annotations

from goals import Goal
from goals_gpu_decode import DECODE
from goals_gpu_masks import FORWARD, GRADIENTS
from goals_gpu_planning import COMPILE, PLAN, SIMULATOR
from goals_gpu_recurrence import RECURRENCE
from goals_gpu_routing import ROUTING

GOALS: tuple[Goal, ...] = (*FORWARD, *GRADIENTS, *DECODE, *RECURRENCE, *ROUTING, *PLAN, *COMPILE, *SIMULATOR)
