"""Analysis of a pattern before anything runs, without torch: its pairs, its growth, its simulations.

The command line starts from this module, so that it runs where torch is not installed, and starts faster where it is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.planning.build_plan import build_plan
from attnc.compiler.planning.cpu_plan import Plan
from attnc.runtime.call.call_errors import ArgumentError, UnsupportedError, needing_torch
from attnc.runtime.call.call_shapes import TensorSizes
from attnc.runtime.patterns.pattern_description import PatternDescription

if TYPE_CHECKING:
    from attnc.compiler.growth.growth import Growth
    from attnc.compiler.simulation.simulation import Baseline, Pass, Simulation
    from attnc.runtime.api.attention import Attention
    from attnc.runtime.simulate.simulating import Floor, RequestedSimulation


class PatternAnalysis(PatternDescription):
    """A pattern with everything known without tensors: masks, plans, growth, simulations, kernel texts."""

    @property
    @abstractmethod
    def _compiled(self) -> Attention:
        """The compiled pattern. Raises TorchMissingError."""

    # --- pairs ---

    def _drawn_mask(self, n_q: int, n_k: int, head: int, inputs: Mapping[str, object]) -> NDArray[np.bool_]:
        """Return the pairs that a picture of one head shows, for the first batch entry.

        Raises TorchMissingError where content selects and torch is not installed, and the errors of `Attention.mask`.
        """
        if self._pattern.selections:
            with needing_torch(f"what `{self.name}` selects, which depends on vectors,"):
                return self._compiled._drawn_mask(n_q, n_k, head, inputs)
        self._refuse_states("mask")
        return self._visible(self._sizes(n_q, n_k, None, None, inputs, at_least=head + 1), inputs, 0, head)

    def _drawn_plan(self, n_q: int, n_k: int, heads: int, inputs: Mapping[str, object]) -> Plan:
        """Return a plan whose pieces cover the pairs of one attention."""
        self._refuse_recurrence("plan", "`attend.derivation()` says how it runs, `attend.simulate(…)` in which chunks")
        self._refuse_states("mask")
        return build_plan(self._relations(self._sizes(n_q, n_k, heads, None, inputs), inputs))

    # --- laws ---

    def growth(self, *, heads: int | None = None) -> Growth:
        """Return how the visible pairs grow with the length: a formula with its derivation, or a fitted law.

        The pairs of `heads` heads are added up, where heads differ. For a grid of tokens the law is fitted along the
        first axis.
        """
        self._refuse_states("growth")
        from attnc.runtime.simulate.simulating import growth  # only for simulations

        return growth(self._bound, self._pattern, heads)

    def floors(
        self, n_q: int, n_k: int | None = None, *, heads: int | None = None, **inputs: object
    ) -> tuple[Floor, ...]:
        """Return how sparse the pattern can become by its real parameters, and the pairs that stay visible.

        The result is empty for a pattern that selects by content.
        """
        self._refuse_states("floors")
        from attnc.runtime.simulate.simulating import floors  # only for simulations

        if self._pattern.selections:
            return ()
        return floors(self._bound, self._sizes(n_q, n_k, heads, heads, inputs), inputs)

    # --- simulations ---

    def _simulated(
        self,
        n_q: int,
        n_k: int,
        inputs: Mapping[str, object],
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        batch: int | None = None,
        head_dim: int = 128,
        dtype: str | None = None,
        device: str = "h100",
        stage: Pass = "forward",
        baseline: Baseline | None = None,
        tile: tuple[int, int] | None = None,
        order: Literal["natural", "bricks", "residues"] | None = None,
    ) -> Simulation:
        """Return the simulation of a call, as `Attention.simulate` does; `dtype` is the dtype's name.

        Raises TorchMissingError for `device="cpu"` where torch is not installed, and the errors of
        `Attention.simulate`.
        """
        if self._pattern.recur is not None and (tile is not None or order is not None):
            raise ArgumentError("tile and order apply to pairs; the chunks of a recurrence are chosen by their time")
        from attnc.compiler.simulation.candidates import ScheduleRequest  # only for simulations
        from attnc.runtime.simulate.simulating import (  # only for simulations
            RequestedSimulation,
            default_dtype,
            find_device,
            simulated,
        )

        machine = find_device(device)
        dtype = default_dtype(machine) if dtype is None else dtype
        sizes = self._sizes(n_q, n_k, heads, kv_heads, inputs, batch=batch, head_dim=head_dim, dtype=dtype)
        request = RequestedSimulation(
            self._pattern,
            self._bound.values,
            sizes,
            inputs,
            machine,
            stage,
            baseline,
            ScheduleRequest(tile, order),
            plan=lambda: self._plan_on_cpu(sizes, inputs),
        )
        if self._pattern.recur is not None:
            from attnc.runtime.simulate.simulating_states import simulated_recurrence  # only for simulations

            (recurrent,) = self._recurrents()
            return simulated_recurrence(request, recurrent)
        branches = self._branches
        if self._pattern.stateful:
            return self._simulated_states(request)
        if self._pattern.selections:
            from attnc.runtime.simulate.simulating_choices import simulated_choices  # only for simulations

            if stage == "decode":
                raise UnsupportedError(
                    f"simulation of decode is not supported yet for `{self.name}`, which selects by content"
                )
            request.check("the kernels of selected keys have their own")
            assert branches is not None
            return simulated_choices(request, branches.open.relations(sizes, inputs))
        if branches is None:
            return simulated(request, [self._relations(sizes, inputs)])
        return simulated(request, [relations for _, relations in branches.relations(sizes, inputs)])

    def _simulated_states(self, request: RequestedSimulation) -> Simulation:
        from attnc.compiler.simulation.machine import Machine  # only for simulations
        from attnc.runtime.simulate.simulating_states import simulated_states  # only for simulations

        if not isinstance(request.device, Machine) or self._pattern.selections or request.stage == "decode":
            self._refuse_states("simulation on a CPU, of decode, or beside selections: simulate a whole call on a GPU")
        request.check("chunks of branches with a state have their own sizes")
        branches = self._branches
        assert branches is not None
        attends = branches.relations(request.sizes, request.inputs) if self._pattern.nodes else []
        return simulated_states(request, attends, self._recurrents())

    def _plan_on_cpu(self, sizes: TensorSizes, inputs: Mapping[str, object]) -> Plan:
        """Return the plan of the CPU executor, with costs at this machine's rates."""
        return self._compiled._plan_on_cpu(sizes, inputs)
