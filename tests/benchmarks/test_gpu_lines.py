"""Lines that only a GPU runs, with CUDA played by objects that note what is asked of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import gpu_calibrate
import gpu_masks
import gpu_parts
import gpu_plan
import gpu_recurrence
import gpu_routing
import pytest
import report
import timing
import torch
from baselines import rival
from benchmark_part import Setting
from document import DocumentTable, Paragraph

from attnc.runtime.tuning.timer import Timing

CUDA, TOY = Setting("cuda", toy=False), Setting("cpu", toy=True)


@dataclass
class Device:
    """Streams and graphs: `noted` is what happened, in order; a graph replays what was run while it was open."""

    noted: list[str] = field(default_factory=list)

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Stream:
            def wait_stream(self, other: object) -> None:
                pass

        device = self

        class Graph:
            def replay(self) -> None:
                device.noted.append("replay")

        @contextmanager
        def noted(word: str) -> Iterator[None]:
            device.noted.append(f"{word} opened")
            yield
            device.noted.append(f"{word} closed")

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: noted("stream"))
        monkeypatch.setattr(torch.cuda, "graph", lambda graph: noted("graph"))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: device.noted.append("synchronize"))


def test_a_capture_warms_up_beside_and_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    device.patch(monkeypatch)

    def run() -> str:
        device.noted.append("run")
        return "tensors"

    replay, found = gpu_parts.captured(run, warm_up=2)
    replay()
    assert found == "tensors"
    assert device.noted == [
        *("stream opened", "run", "run", "stream closed"),
        *("graph opened", "run", "graph closed", "replay"),
    ]


Interleaved = Callable[[Mapping[str, Callable[[], object]], int, int, int], dict[str, Timing]]


def clock(took: Mapping[str, float], asked: list[tuple[int, int]]) -> Interleaved:
    """Timing of runs by name, each run once."""

    def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int, warm_up: int, l2: int) -> dict[str, Timing]:
        asked.append((rounds, warm_up))
        for run in runs.values():
            run()
        return {name: Timing.of([took[name]] * rounds) for name in runs}

    return interleaved


def test_short_runs_are_captured_and_long_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    Device().patch(monkeypatch)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(timing, "interleaved_on_gpu", clock({"attnc": 0.05, "rival": 2.0}, asked))
    runs = {"attnc": lambda: None, "rival": lambda: None}
    found = gpu_parts.timed(CUDA, runs, graphs=True)
    assert found["captured"] == ["attnc", "rival"]
    assert found["ms"]["attnc"]["rounds"] == asked[-1][0] == gpu_parts.MOST_ROUNDS
    assert "captured" not in gpu_parts.timed(CUDA, runs, graphs=False)
    assert "captured" not in gpu_parts.timed(CUDA, {"rival": runs["rival"]}, graphs=True)
    assert asked[0] == (1, 1)


def test_what_cannot_be_captured_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    device.patch(monkeypatch)

    def refused() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    assert gpu_parts._replayed(refused) is None
    assert device.noted[-1] == "synchronize"


def test_a_device_by_torchs_name_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert gpu_parts.simulated_device(CUDA) == "h200"
    assert gpu_recurrence.published_bytes_per_ms("h200") == pytest.approx(4.8e9)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU of tomorrow")
    assert gpu_parts.simulated_device(CUDA) is None
    assert gpu_recurrence.published_bytes_per_ms(None) is None


def test_what_ran_on_the_device_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [SimpleNamespace(device_type=kind) for kind in ("DeviceType.CPU", "DeviceType.CUDA", "DeviceType.CUDA")]

    class Profile:
        def __init__(self, activities: object) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *error: object) -> None:
            pass

        def events(self) -> list[SimpleNamespace]:
            return events

    Device().patch(monkeypatch)
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    watch = gpu_plan.watched(CUDA)
    with watch:
        lists, doc = torch.zeros(4, dtype=torch.int32), torch.zeros(3)
        watch.launches.append({"q": torch.zeros(9), "full_tiles": lists, "windows": doc})
    assert (watch.others, watch.profiled) == (1, True)
    assert watch.list_bytes({"doc": doc}) == 16
    assert watch.list_bytes({}) == 28


def test_a_wait_for_the_device_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    case = gpu_routing.Chosen("moba", {"block": 16})
    made: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", made.append)
    waiting = {"error": False}

    class Attend:
        def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if made and made[-1] == "error" and waiting["error"]:
                raise RuntimeError("called a synchronizing CUDA operation")
            return q * 1 + k.sum() + v.sum()

    monkeypatch.setattr(gpu_routing, "_attention", lambda name, **params: Attend())
    monkeypatch.setattr(gpu_routing, "STEPS", 1)
    setting = SimpleNamespace(cuda=True, toy=True, device="cpu")
    for waits in (False, True):
        waiting["error"] = waits
        row = gpu_routing._steps(setting, case)  # type: ignore[arg-type]  # stands in for a Setting
        assert row["ok"] is not waits and row["watched"]
        assert made[-1] == "default"


def test_figures_follow_what_was_measured(tmp_path: Any) -> None:
    """Kernels that are half as fast have about half the share; a copy at half of the peak is that."""
    machine = gpu_calibrate.described("h100")
    peak = machine["figures"]["hbm_tb_per_s"]["value"] * 1e9
    full = {(16, 4096): 2.0}
    found = [
        gpu_calibrate.Measured({key: ms * slow for key, ms in full.items()}, 1.0, int(peak / 2), 0.003, 0.01)
        for slow in (1, 2)
    ]
    assert found[0].count == 4 and found[0].best(16) == pytest.approx(2e6 / (16 * 4096**2))
    shares = []
    for one in found:
        path = gpu_calibrate.fitted(TOY, one, tmp_path)
        figures = json.loads((tmp_path / path).read_text(encoding="utf-8"))["figures"]
        assert figures["hbm_share"]["value"] == pytest.approx(0.5)
        assert figures["launch_us"]["value"] == pytest.approx(3)
        assert gpu_calibrate._predicted_over_measured(TOY, one, 16, path) == pytest.approx(1, rel=0.05)
        shares.append(figures["kernel_share"]["16"]["value"])
    assert shares[1] == pytest.approx(shares[0] / 2, rel=0.1)


def test_published_figures_are_marked() -> None:
    shown = {"published": "NATTEN kernel", "value": 16.2, "unit": "ms", "machine": "H100"}
    row = {"key": "a", "absent": {"natten": "not here"}, "published": [{**shown, "configuration": "", "source": "x"}]}
    told, table = report.beside([row, {"key": "b"}])
    assert isinstance(told, Paragraph) and "natten: not here (1 rows)" in str(told)
    assert isinstance(table, DocumentTable) and "published, not measured here" in str(table) and "16.2 ms" in str(table)


def test_a_rival_that_raises_or_is_wrong_takes_no_part() -> None:
    mask = rival.causal(32)
    leaves = gpu_parts.operands(TOY, 32, torch.float32, heads=(2, 2), d=16)

    def right(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v) + 0 * q

    def raising(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("heads of 16\nand more")

    tried = {"right": right, "wrong": wrong, "raising": raising}
    given = gpu_masks.MaskRace(right, tried, {"dense": right, "refused": raising}, {"gone": "not here"})
    race, absent = gpu_masks._right(given, mask, leaves, "backward")
    assert (set(race.alike), set(race.dense)) == ({"right"}, {"dense"})
    assert set(absent) == {"wrong", "raising", "refused", "gone"}
    assert absent["raising"] == "NotImplementedError: heads of 16" and "wrong" in absent["wrong"]
