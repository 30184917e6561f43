"""A pattern looked at before anything runs: its pairs, its growth, its simulations; without torch.

The command line starts from here, so that it runs where torch is not installed, and sooner where it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.call_warnings import call_warnings
from attnc.compiler.lowering.lower import lower
from attnc.compiler.planning.build_plan import build_plan
from attnc.compiler.planning.cpu_plan import Plan
from attnc.runtime.call_errors import ArgumentError, UnsupportedError, needing_torch
from attnc.runtime.call_shapes import TensorSizes
from attnc.runtime.pattern_description import PatternDescription, read_spec
from attnc.runtime.warned import warn_of_pattern

if TYPE_CHECKING:
    from attnc.compiler.growth.growth import Growth
    from attnc.compiler.simulation.candidates import ScheduleRequest
    from attnc.compiler.simulation.simulation import Baseline, Pass, Simulation
    from attnc.runtime.attention import Attention
    from attnc.runtime.floors import Floor
    from attnc.runtime.simulating import Device


def analyse(spec: str | PathLike[str], params: Mapping[str, object], preset: str | None) -> PatternAnalysis:
    """The pattern that a spec names, not compiled for calls; errors and warnings are those of `compile_attention`."""
    bound, modules = read_spec(spec, params, preset)
    found = PatternAnalysis(bound, modules, lower(bound))
    warn_of_pattern(bound.program.name, call_warnings(bound))
    return found


class PatternAnalysis(PatternDescription):
    """A pattern with all that can be asked of it without tensors: masks, plans, growth, simulations, kernel texts."""

    _attention: Attention | None = None

    @property
    def _compiled(self) -> Attention:
        """The pattern, compiled once it is asked for. Raises TorchMissingError."""
        if self._attention is None:
            with needing_torch(f"a call of `{self.name}`"):
                from attnc.runtime.attention import Attention
                from attnc.runtime.compiled import Options
            self._attention = Attention(self._bound, Options(), self._modules)
        return self._attention

    # --- pairs ---

    def _drawn_mask(self, n_q: int, n_k: int, head: int, inputs: Mapping[str, object]) -> NDArray[np.bool_]:
        """The pairs that a picture of one head shows, of the first batch entry.

        Raises TorchMissingError where content chooses and torch is not installed, and what `Attention.mask` raises.
        """
        if self._pattern.selections:
            with needing_torch(f"what `{self.name}` selects, which depends on vectors,"):
                return self._compiled._drawn_mask(n_q, n_k, head, inputs)
        self._refuse_states("mask")
        return self._visible(self._sizes(n_q, n_k, None, None, inputs, at_least=head + 1), inputs, 0, head)

    def _drawn_plan(self, n_q: int, n_k: int, heads: int, inputs: Mapping[str, object]) -> Plan:
        """A plan whose pieces cover the pairs of one attention."""
        self._refuse_recurrence("plan", "`attend.derivation()` says how it runs, `attend.simulate(…)` in which chunks")
        self._refuse_states("mask")
        return build_plan(self._relations(self._sizes(n_q, n_k, heads, None, inputs), inputs))

    def _visible(self, sizes: TensorSizes, inputs: Mapping[str, object], batch: int, head: int) -> NDArray[np.bool_]:
        branches = self._branches
        if branches is not None:
            return branches.visible(sizes, inputs, batch, head)
        return self._relations(sizes, inputs).mask(batch, head, 0, sizes.n_q, 0, sizes.n_k)

    # --- laws ---

    def growth(self, *, heads: int | None = None) -> Growth:
        """Return how the visible pairs grow with the length: a formula with its derivation, or a fitted law.

        Of `heads` heads together, where they differ. Of a grid of tokens it is fitted along its first axis.
        """
        self._refuse_states("growth")
        from attnc.runtime.simulating import growth

        return growth(self._bound, self._pattern, heads)

    def floors(
        self, n_q: int, n_k: int | None = None, *, heads: int | None = None, **inputs: object
    ) -> tuple[Floor, ...]:
        """Return how sparse the pattern can become by its real parameters, and the pairs that stay visible.

        Nothing is said of a pattern that chooses by content.
        """
        self._refuse_states("floors")
        from attnc.runtime.simulating import floors

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
        """The simulation of a call, as `Attention.simulate` has it; `dtype` by its name.

        Raises TorchMissingError for `device="cpu"` where torch is not installed, and what `Attention.simulate` raises.
        """
        if self._pattern.recur is not None and (tile is not None or order is not None):
            raise ArgumentError("tile and order are of pairs; the chunks of a recurrence are chosen by their time")
        from attnc.compiler.simulation.candidates import ScheduleRequest
        from attnc.runtime.simulating import default_dtype, find_device, simulated

        machine = find_device(device)
        dtype = default_dtype(machine) if dtype is None else dtype
        sizes = self._sizes(n_q, n_k, heads, kv_heads, inputs, batch=batch, head_dim=head_dim, dtype=dtype)
        values, wish = self._bound.values, ScheduleRequest(tile, order)
        if self._pattern.recur is not None:
            from attnc.runtime.simulating_recurrences import simulated_recurrence

            (recurrent,) = self._recurrents()
            return simulated_recurrence(recurrent, values, sizes, machine, stage, inputs)
        if self._pattern.stateful:
            return self._simulated_states(sizes, inputs, machine, stage, baseline, wish)
        if self._pattern.selections:
            return self._simulated_choices(sizes, inputs, machine, stage, baseline, wish)
        branches = self._branches
        if branches is None:
            attends = [self._relations(sizes, inputs)]
        else:
            attends = [relations for _, relations in branches.relations(sizes, inputs)]
        return simulated(
            self.name,
            values,
            attends,
            sizes,
            machine,
            lambda: self._plan_on_cpu(sizes, inputs),
            stage,
            baseline,
            wish,
        )

    def _simulated_states(
        self,
        sizes: TensorSizes,
        inputs: Mapping[str, object],
        machine: Device,
        stage: Pass,
        baseline: Baseline | None,
        wish: ScheduleRequest,
    ) -> Simulation:
        from attnc.compiler.simulation.candidates import ScheduleRequest
        from attnc.compiler.simulation.machine import Machine
        from attnc.runtime.simulating import check_asked
        from attnc.runtime.simulating_states import simulated_states

        if not isinstance(machine, Machine) or self._pattern.selections or stage == "decode":
            self._refuse_states("simulation on a CPU, of decode, or beside choices: ask for a whole call on a GPU")
        assert isinstance(machine, Machine)
        check_asked(stage, baseline, wish, on_cpu=False)
        if wish != ScheduleRequest():
            raise ArgumentError("tile and order are of pairs; the chunks of branches with a state have their own")
        branches = self._branches
        assert branches is not None
        attends = branches.relations(sizes, inputs) if self._pattern.nodes else []
        own = self._recurrents()
        return simulated_states(self.name, self._bound.values, attends, own, sizes, machine, stage, baseline, inputs)

    def _simulated_choices(
        self,
        sizes: TensorSizes,
        inputs: Mapping[str, object],
        machine: Device,
        stage: Pass,
        baseline: Baseline | None,
        wish: ScheduleRequest,
    ) -> Simulation:
        from attnc.compiler.simulation.candidates import ScheduleRequest
        from attnc.compiler.simulation.cpu_ladder import CpuMachine
        from attnc.runtime.simulating import check_asked
        from attnc.runtime.simulating_choices import simulated_choices

        if stage == "decode":
            raise UnsupportedError(f"decode of `{self.name}`, which chooses by content, is not simulated yet")
        check_asked(stage, baseline, wish, on_cpu=isinstance(machine, CpuMachine))
        if wish != ScheduleRequest():
            raise ArgumentError("tile and order are chosen for pairs; the kernels of chosen keys have their own")
        branches = self._branches
        assert branches is not None
        relations, bound = branches.open.relations(sizes, inputs), self._bound.values

        def plan() -> Plan:
            return self._plan_on_cpu(sizes, inputs)

        return simulated_choices(self._pattern, bound, relations, plan, sizes, inputs, machine, stage, baseline)

    def _plan_on_cpu(self, sizes: TensorSizes, inputs: Mapping[str, object]) -> Plan:
        """The plan of the CPU's executor, which is costed with the rates of this machine."""
        return self._compiled._plan_on_cpu(sizes, inputs)


__all__ = ["PatternAnalysis", "analyse"]
