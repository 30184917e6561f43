"""Inspection of a compiled pattern: masks, plans, kernel texts, simulations, pictures."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.planning.cpu_plan import Plan
from attnc.runtime.api.compiled import CompiledAttention
from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError, UnsupportedError
from attnc.runtime.call.call_inputs import CallInputs
from attnc.runtime.call.call_shapes import dtype_name
from attnc.runtime.call.device_targets import named_target, planned_target
from attnc.runtime.call.lengths import natural_length
from attnc.runtime.call.tensor_checks import (
    FLOATS,
    TensorSizes,
    check_are_tensors,
    check_counts,
    check_tensors,
    completed,
    finite,
    input_tensors,
)
from attnc.runtime.executors.reference.reference_plan import reference_plan
from attnc.runtime.pictures.picture_limits import check_mask_size

if TYPE_CHECKING:
    from typing_extensions import Self

    from attnc.compiler.simulation.simulation import Simulation


class Shown(CompiledAttention):
    """Methods that inspect a pattern before anything runs."""

    @abstractmethod
    def _on_sequences(self) -> Self:
        """Return the pattern for calls with `cu_seqlens`. Raises ArgumentError, UnsupportedError."""

    def mask(
        self,
        n_q: int,
        n_k: int | None = None,
        *,
        head: int = 0,
        heads: int | None = None,
        kv_heads: int | None = None,
        q: Tensor | None = None,
        k: Tensor | None = None,
        v: Tensor | None = None,
        **inputs: object,
    ) -> Tensor:
        """Return the relation as a mask, bool (Nq, Nk); with a leading batch dimension where an input has one.

        For several branches the mask holds the pairs visible in at least one branch; a unit of keys stands for its
        tokens. A pattern with selections needs `q` and `k` of a call, and `v` if a selection reads values (`k` is used
        in place of a missing `v`); its mask has a leading batch dimension.

        `heads` matters only to a relation that reads the number of heads; the default comes from the parameters and
        inputs. `cu_seqlens`, as in a call: several packed sequences. Raises ArgumentError for a mask of more than 4
        GiB.
        """
        if "cu_seqlens" in inputs and self._form != "packed":
            return self._on_sequences().mask(
                n_q, n_k, head=head, heads=heads, kv_heads=kv_heads, q=q, k=k, v=v, **inputs
            )
        self._refuse_states("mask")
        check_mask_size(n_q, n_q if n_k is None else n_k)
        if self._pattern.selections:
            return self._mask_of_chosen(n_q, n_k, head, q, k, v, inputs)
        sizes = self._sizes(n_q, n_k, heads, kv_heads, inputs, at_least=head + 1)
        if not 0 <= head < sizes.heads:
            raise ArgumentError(f"head is {head}: there are {sizes.heads} heads")
        batched = any("batch" in tensor.dims for tensor in self._pattern.tensors)
        masks = [torch.from_numpy(self._visible(sizes, inputs, b, head)) for b in range(sizes.batch if batched else 1)]
        return torch.stack(masks) if batched else masks[0]

    def _mask_of_chosen(
        self,
        n_q: int,
        n_k: int | None,
        head: int,
        q: Tensor | None,
        k: Tensor | None,
        v: Tensor | None,
        inputs: Mapping[str, object],
    ) -> Tensor:
        """Return the visible pairs of a call, (batch, Nq, Nk)."""
        if q is None or k is None:
            name = self._pattern.selections[0].name
            raise ArgumentError(f"mask: the selection `{name}` of `{self.name}` depends on content; pass `q` and `k`")
        if (q.shape[2], k.shape[2]) != (n_q, n_q if n_k is None else n_k):
            raise ArgumentError(f"mask: q has {q.shape[2]} and k {k.shape[2]} tokens, not {n_q} and {n_k or n_q}")
        sizes, arguments, chosen = self._chosen(q, k, k if v is None else v, None, inputs)
        if not 0 <= head < sizes.heads:
            raise ArgumentError(f"head is {head}: there are {sizes.heads} heads")
        assert self._steps is not None
        all_inputs = {**arguments, **chosen}
        return torch.stack([self._steps.mask(sizes, all_inputs, b, head) for b in range(sizes.batch)])

    def chosen(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **inputs: object
    ) -> dict[str, Tensor]:
        """Return the result of each selection in a call, by its name: bool (B[, Hq or Hkv], rows, items).

        The result has heads where it differs between heads. A row is a query, a unit of queries, or all of them (1
        row); an item is a key, a unit of keys, or a number, counted from 0. A family has the rows of its members one
        after another. Raises ArgumentError, ArgumentTypeError.
        """
        return self._chosen(q, k, v, scale, inputs)[2]

    def _chosen(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, inputs: Mapping[str, object]
    ) -> tuple[TensorSizes, Mapping[str, object], dict[str, Tensor]]:
        """Return the sizes of a call, its inputs, and the results of its selections."""
        if not self._pattern.selections:
            raise ArgumentError(f"`{self.name}` has no selection: nothing is chosen by content")
        if self._pattern.documents is not None or "cu_seqlens" in inputs:
            raise UnsupportedError(
                f"selections of `{self.name}` within documents are not supported: pass each document separately"
            )
        assert self._steps is not None
        check_are_tensors(q, k, v)
        sizes = check_tensors(q, k, v)
        inputs = completed(self._pattern, inputs)
        tensors = input_tensors(self._pattern, inputs)
        real = {t.name: x for t, x in zip(self._pattern.tensors, tensors, strict=True)}
        factor = float(sizes.dk**-0.5) if scale is None else finite(scale)
        with torch.no_grad():
            return sizes, inputs, self._steps.chosen(q, k, v, CallInputs(sizes, inputs, real, factor))

    def _drawn_mask(self, n_q: int, n_k: int, head: int, inputs: Mapping[str, object]) -> NDArray[np.bool_]:
        """Return the pairs that a picture of one head shows, for the first batch entry."""
        arguments: dict[str, Any] = {**inputs}
        mask = self.mask(n_q, n_k, head=head, **arguments)
        pairs: NDArray[np.bool_] = (mask[0] if mask.dim() == 3 else mask).numpy()
        return pairs

    def _drawn_plan(self, n_q: int, n_k: int, heads: int, inputs: Mapping[str, object]) -> Plan:
        """Return the plan of a call, which covers the pairs of one attention."""
        if not self.is_recurrence:
            self._refuse_states("mask")
        arguments: dict[str, Any] = {**inputs}
        return self.plan(n_q, n_k, heads=heads, **arguments)

    def plan(
        self,
        n_q: int,
        n_k: int | None = None,
        *,
        heads: int = 1,
        kv_heads: int | None = None,
        batch: int | None = None,
        head_dim: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        **inputs: object,
    ) -> Plan:
        """Return the plan of a call of this shape. `cu_seqlens`, as in a call: several packed sequences.

        `device`: "cpu", or "cuda" for the kernels of the GPU of this machine, or of sm_90 where there is none. Raises
        ArgumentError, ArgumentTypeError, UnsupportedError, SpecError, EvaluationError.
        """
        if "cu_seqlens" in inputs and self._form != "packed":
            options: Any = {"batch": batch, "head_dim": head_dim, "dtype": dtype, "device": device, **inputs}
            return self._on_sequences().plan(n_q, n_k, heads=heads, kv_heads=kv_heads, **options)
        self._refuse_recurrence("plan", "`attend.derivation()` says how it runs, `attend.simulate(…)` in which chunks")
        target = planned_target(device, self._options.backend)
        if dtype not in FLOATS:
            raise ArgumentTypeError(f"dtype is {dtype}: it must be a floating dtype")
        sizes = self._sizes(n_q, n_k, heads, kv_heads, inputs, batch=batch, head_dim=head_dim, dtype=dtype_name(dtype))
        if self._is_reference:
            states = () if self._steps is None else [recurrence.recur.name for recurrence in self._steps.stateful]
            return reference_plan(self._all_relations(sizes, inputs), states)
        if self._steps is None:
            if target is None:
                return self._cpu_plans.plan(sizes, inputs)
            from attnc.runtime.executors.triton.gpu_plan import plan_on_gpu  # only where kernels run

            return plan_on_gpu(self._planner, sizes, inputs, target)
        return self._steps.plan(sizes, inputs, target)

    def _all_relations(self, sizes: TensorSizes, inputs: Mapping[str, object]) -> list[tuple[str, Relations]]:
        """Return the relations of all attentions by name, with everything visible that selections may select."""
        if self._steps is None:
            return [(self.name, self._relations(sizes, inputs))]
        steps = self._steps.open if self._pattern.chooses else self._steps
        return [(node.name, relations) for node, relations in steps.relations(sizes, inputs)]

    def source(
        self,
        target: str | None = None,
        *,
        head_dim: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        **inputs: object,
    ) -> dict[str, str]:
        """Return the Triton text of every kernel of calls with this head dimension, by name, paged decode included.

        `target`: "sm_80", "sm_90", "sm_100" or "gfx942"; None: the GPU of this machine, or sm_90 where there is none.
        Only patterns whose number of attentions depends on `inputs` need them. For a recurrence, the texts of all
        kernels that a call starts, alone and with its gradient.

        Raises ArgumentError, ArgumentTypeError, UnsupportedError.
        """
        from attnc.runtime.executors.triton.kernel_texts import sources  # only where kernels run

        # only where kernels run
        from attnc.runtime.executors.triton.recurrent.recurrence_texts import recurrent_sources

        check_counts(1, head_dim=head_dim)
        if dtype not in FLOATS:
            raise ArgumentTypeError(f"dtype is {dtype}: it must be a floating dtype")
        texts: dict[str, str] = {}
        for recurrent in self._recurrents():
            texts |= recurrent_sources(self._bound, recurrent, named_target(target), head_dim, dtype, inputs)
        if self.is_recurrence:
            return texts
        planners = [(self.name, self._planner)]
        if self._steps is not None:
            tokens = natural_length(self._bound, head_dim) or head_dim
            name = dtype_name(dtype)
            sizes = self._sizes(tokens, None, None, None, inputs, head_dim=head_dim, dtype=name)
            planners = self._steps.by_kernels.planners(sizes, inputs)
        try:
            return texts | sources(planners, named_target(target), head_dim, dtype)
        except UnsupportedError:
            if not texts:
                raise
            return texts  # only the branches with a state have kernels

    def simulate(
        self,
        n_q: int,
        n_k: int | None = None,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        batch: int | None = None,
        head_dim: int = 128,
        dtype: torch.dtype | None = None,
        device: str = "h100",
        stage: Literal["forward", "backward", "decode"] = "forward",
        baseline: Literal["full", "causal"] | None = None,
        tile: tuple[int, int] | None = None,
        order: Literal["natural", "bricks", "residues"] | None = None,
        **inputs: object,
    ) -> Simulation:
        """Simulate a call of this shape on a machine, without running it: a ladder of bounds, the time, the schedule.

        `device`: a machine's name ("a100", "h100", "h200", "b200"), a file that describes one, or "cpu", this machine.
        `dtype`: bf16 by default, fp32 on the CPU. `tile` (queries, keys) and `order` restrict the search. `baseline`:
        the dense rival; None: causal attention if no query sees a key behind its own position, else full. For a
        recurrence the result is a `RecurrenceSimulation`, always against dense causal attention; sizes that the pattern
        names are keywords, `slots=64`.

        Raises MachineError, ArgumentError, ArgumentTypeError, UnsupportedError, SpecError, EvaluationError.
        """
        if dtype is not None and dtype not in FLOATS:
            raise ArgumentTypeError(f"dtype is {dtype}: it must be a floating dtype")
        return self._simulated(
            n_q,
            n_q if n_k is None else n_k,
            inputs,
            heads=heads,
            kv_heads=kv_heads,
            batch=batch,
            head_dim=head_dim,
            dtype=None if dtype is None else dtype_name(dtype),
            device=device,
            stage=stage,
            baseline=baseline,
            tile=tile,
            order=order,
        )

    def picture(self, n: int, *, head: int = 0, **inputs: object) -> str:
        """Return an SVG of the pattern at length n: element view, tile view, keys per row; or one view per branch."""
        from attnc.runtime.pictures.branch_svg import branches_svg  # only for pictures
        from attnc.runtime.pictures.branch_views import has_states  # only for pictures
        from attnc.runtime.pictures.branches import make_branches  # only for pictures
        from attnc.runtime.pictures.draw import draw, to_svg  # only for pictures

        check_counts(0, n=n, head=head)
        if has_states(self):
            return branches_svg(make_branches(self, n, n, inputs, head=head))
        return to_svg(draw(self, n, None, head=head, **inputs))
