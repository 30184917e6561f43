"""Simulations as JSON, with the keys that the command line promises."""

from __future__ import annotations

import dataclasses
from math import isinf

from attnc.compiler.growth.growth import Growth
from attnc.compiler.simulation.recurrent.recurrence_simulation import RecurrenceSimulation, SimulatedPass
from attnc.compiler.simulation.simulation import SimulatedSchedule, Simulation
from attnc.runtime.commands.patterns import value_json
from attnc.runtime.commands.simulate_cases import SimulateCases
from attnc.runtime.simulate.simulating import Floor


def answer_json(cases: SimulateCases) -> dict[str, object]:
    """Return all results as JSON: the keys of the main simulation, and the other results under keys of their own."""
    even = cases.even
    return {
        **simulation_json(cases.main),
        "rivals": {name: None if rival is None else _rival_json(rival) for name, rival in cases.rivals.items()},
        "break_even_length": even if isinstance(even, int) else None,
        "break_even_note": even if isinstance(even, str) else None,
        **_law_json(cases),
        "floors": [_floor_json(floor) for floor in cases.floors],
        "examples": cases.examples,
        "compared": [simulation_json(other) for other in cases.others],
        "sweep": [{"at": name, **simulation_json(simulation)} for name, simulation in cases.swept],
    }


def _rival_json(simulation: Simulation) -> dict[str, object]:
    """Return the times of a dense rival and the pattern's speedup over it."""
    return {
        "dense_ms": _finite(simulation.dense_ms),
        "ideal_dense_ms": _finite(simulation.ideal_ms),
        "speedup": _finite(simulation.speedup),
    }


def simulation_json(simulation: Simulation) -> dict[str, object]:
    """Return a simulation with the JSON keys that the command line promises. An infinite speedup is null."""
    shape, choice = simulation.shape, simulation.choices[0]
    recurrence_fields = recurrence_json(simulation) if isinstance(simulation, RecurrenceSimulation) else {}
    return recurrence_fields | {
        "pattern": simulation.pattern,
        "params": {name: value_json(value) for name, value in simulation.params.items()},
        "device": simulation.device,
        "dtype": shape.dtype,
        "shape": {
            "batch": shape.batch,
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "queries": shape.n_q,
            "keys": shape.n_k,
            "dk": shape.dk,
            "dv": shape.dv,
        },
        "pass": simulation.stage,
        "baseline": simulation.baseline,
        "causal": simulation.causal,
        "visible": simulation.visible,
        "estimated": simulation.estimated,
        "element_density": simulation.density,
        "tiles": {
            "total": simulation.tiles.total,
            "live": simulation.tiles.live,
            "full": simulation.tiles.full,
            "partial": simulation.tiles.partial,
        },
        "schedule": _choice_json(choice),
        "kernels": [_choice_json(schedule) for schedule in simulation.choices],
        "runners_up": [_choice_json(schedule) for schedule in simulation.others],
        "rungs": [
            {"name": rung.name, "speedup": _finite(rung.speedup), "lost_to": rung.lost_to} for rung in simulation.rungs
        ],
        "predicted_ms": simulation.predicted_ms,
        "dense_ms": _finite(simulation.dense_ms),
        "ideal_dense_ms": _finite(simulation.ideal_ms),
        "speedup": _finite(simulation.speedup),
        "calibrated": simulation.calibrated,
        "flop": simulation.flop,
        "bytes": {
            "least": simulation.traffic.least,
            "moved": simulation.traffic.moved,
            "held": simulation.traffic.held,
        },
        "notes": list(simulation.notes),
    }


def recurrence_json(simulation: RecurrenceSimulation) -> dict[str, object]:
    """Return the JSON fields that only a recurrence has. The cost of a chunk that does not fit has no `ms`."""
    return {
        "passes": [_pass_json(simulated) for simulated in simulation.passes],
        "rung_ms": {rung.name: simulation.rung_ms(rung.name) for rung in simulation.rungs},
        "token_by_token_ms": simulation.loop_ms,
        "token_by_token_reason": simulation.reason or None,
        "state_bytes": simulation.state_bytes,
    }


def _pass_json(simulated: SimulatedPass) -> dict[str, object]:
    kernels = [dataclasses.asdict(kernel) for kernel in simulated.kernels]
    costs = [dataclasses.asdict(cost) for cost in simulated.costs]
    fields = {field.name: getattr(simulated, field.name) for field in dataclasses.fields(simulated)}
    return fields | {"kernels": kernels, "costs": costs, "ms": simulated.ms}


def _law_json(cases: SimulateCases) -> dict[str, object]:
    if cases.growth is not None:
        return {"growth": cases.growth.law, "growth_law": _growth_json(cases.growth)}
    law = cases.main.growth if isinstance(cases.main, RecurrenceSimulation) else None
    return {"growth": law, "growth_law": None}


def _choice_json(choice: SimulatedSchedule) -> dict[str, object]:
    return {
        "kernel": choice.kernel,
        "q_tile": choice.q_tile,
        "k_tile": choice.k_tile,
        "order": str(choice.order),
        "q_brick": list(choice.order.q_brick),
        "k_brick": list(choice.order.k_brick),
        "how": choice.how,
        "limit": choice.limit,
        "ms": choice.ms,
    }


def _growth_json(growth: Growth) -> dict[str, object]:
    return {
        "law": growth.law,
        "pairs": None if growth.pairs is None else str(growth.pairs),
        "tiles": None if growth.tiles is None else str(growth.tiles),
        "tile": growth.tile,
        "fitted": growth.fitted,
        "derivation": list(growth.derivation),
        "checked": list(growth.checked),
    }


def _floor_json(floor: Floor) -> dict[str, object]:
    return {
        "parameter": floor.parameter,
        "least": value_json(floor.least),
        "visible": floor.visible,
        "density": floor.density,
        "causes": [{"text": text, "visible": count} for text, count in floor.causes],
    }


def _finite(speedup: float) -> float | None:
    return None if isinf(speedup) else speedup
