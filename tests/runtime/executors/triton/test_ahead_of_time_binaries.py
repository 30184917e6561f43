"""A call uses the kernels that were compiled ahead of time, and compiles nothing again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attnc import ArgumentError, load_binaries
from command_calls import run

WINDOW = ["sliding_window", "-p", "window=40", "--target", "sm_80", "--head-dim", "16", "--dtype", "float16"]


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("binaries") / "window.zip"
    done = run("emit", *WINDOW, "--heads", "4,2", "--binaries", str(path))
    assert done.status == 0, done
    assert "12 kernels for sm_80, heads 4/2 of 16 and 16 in float16" in done.out
    return path


CALL = """
import sys
import torch
import triton
from triton.backends.nvidia.compiler import CUDABackend
from attnc import compile_attention, load_binaries
from attnc.compiler.kernels.targets import TARGETS
from attnc.runtime.api.attention import Attention
from attnc.runtime.toolchain.ahead import absent
from attnc.runtime.executors.triton.launch import started_by
from attnc.runtime.executors.triton.launch import function_of
from attnc.runtime.call.device_targets import pretending

if sys.argv[1] != "-":
    load_binaries(sys.argv[1])
triton.runtime.driver.set_active(absent("sm_80"))


def compiled(*_, **__):
    print("compiled")
    raise SystemExit(3)


CUDABackend.add_stages = compiled
found = []


def start(source, grid, arguments):
    kernel = function_of(source).warmup(*arguments, grid=grid, **source.options)
    found.append(source.function)
    assert kernel.asm["cubin"]


attend = compile_attention("sliding_window", window=int(sys.argv[2]), backend="triton")
q, k, v = (torch.randn(2, h, 200, 16, dtype=torch.float16, requires_grad=True) for h in (4, 2, 2))
with pretending(TARGETS["sm_80"]), started_by(start):
    out = attend(q, k, v)
    torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))
    with torch.no_grad():
        attend.decode(q[:, :, -3:], k, v, kv_len=[120, 77])
print(*sorted(set(found)))
"""


def call_in_process(file: Path | None, cache: Path, window: int = 40) -> subprocess.CompletedProcess[str]:
    """Run a call for a GPU that is not available; the process exits with status 3 if it must compile a kernel."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": ":".join(p for p in sys.path if p)}
    environment.pop("TRITON_INTERPRET", None)
    arguments = [sys.executable, "-c", CALL, "-" if file is None else str(file), str(window)]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_a_call_uses_compiled_binaries(emitted: Path, tmp_path: Path) -> None:
    done = call_in_process(emitted, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    kernel_stages = ("decode", "delta", "dkdv", "dq", "forward", "merge")
    assert done.stdout.split() == [f"sliding_window_{kind}" for kind in kernel_stages]
    second_call = call_in_process(None, tmp_path / "cache")  # the binaries stay in the cache
    assert second_call.returncode == 0, second_call.stderr


@pytest.mark.slow
def test_a_pattern_without_binaries_is_compiled(emitted: Path, tmp_path: Path) -> None:
    assert call_in_process(emitted, tmp_path / "cache", window=41).returncode == 3
    assert call_in_process(None, tmp_path / "empty").returncode == 3


def test_the_manifest_names_the_tuned_choice(emitted: Path) -> None:
    with zipfile.ZipFile(emitted) as file:
        manifest = json.loads(file.read("manifest.json"))
        assert {*file.namelist()} == {"manifest.json", *manifest["files"]}
    assert manifest["schema"] == 1
    forward = next(kernel for kernel in manifest["kernels"] if kernel["stage"] == "forward")
    assert forward["tiles"] == "128×64, 8 warps, 3 stages"
    assert all(name.endswith((".json", ".cubin")) for name in manifest["files"])


def test_equal_arguments_write_equal_files(emitted: Path, tmp_path: Path) -> None:
    path = tmp_path / "again.zip"
    assert run("emit", *WINDOW, "--heads", "4,2", "--binaries", str(path)).status == 0
    assert path.read_bytes() == emitted.read_bytes()


def rewrite(path: Path, out: Path, change: Callable[[str, bytes], tuple[str, bytes]]) -> Path:
    with zipfile.ZipFile(path) as file, zipfile.ZipFile(out, "w") as changed_file:
        for name in file.namelist():
            changed_file.writestr(*change(name, file.read(name)))
    return out


def changing_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[str, bytes], tuple[str, bytes]]:
    def changed(name: str, data: bytes) -> tuple[str, bytes]:
        if name != "manifest.json":
            return name, data
        manifest = json.loads(data)
        change(manifest)
        return name, json.dumps(manifest).encode()

    return changed


def with_flipped_bit(name: str, data: bytes) -> tuple[str, bytes]:
    return name, data[:-1] + bytes([data[-1] ^ 1]) if name.endswith(".cubin") else data


def with_escaping_path(manifest: dict[str, Any]) -> None:
    manifest["files"] = {"../../evil.json": "0"}


DAMAGE: dict[str, tuple[Callable[[str, bytes], tuple[str, bytes]], str]] = {
    "a bit": (with_flipped_bit, "does not match its digest"),
    "schema": (changing_manifest(lambda m: m.update(schema=2)), "unknown schema"),
    "triton": (changing_manifest(lambda m: m.update(triton="1.0")), "compiled by Triton 1.0, but"),
    "a path": (changing_manifest(with_escaping_path), "unexpected file '../../evil.json'"),
    "a key": (changing_manifest(lambda m: m.pop("kernels")), "KeyError"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused_without_writing(
    name: str, emitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, says = DAMAGE[name]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(ArgumentError, match=says):
        load_binaries(rewrite(emitted, tmp_path / "other.zip", change))
    assert not (tmp_path / "cache").exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.zip").write_text("no zip")
    for name in ("text.zip", "missing.zip"):
        with pytest.raises(ArgumentError, match="not a file of binaries"):
            load_binaries(tmp_path / name)


def test_commands(emitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    done = run("cache", "load", str(emitted))
    assert done.status == 0
    assert "loaded 12 kernels for sm_80" in done.out
    assert len(list((tmp_path / "cache").iterdir())) == 12
    assert run("cache", "load", str(tmp_path / "missing.zip")).status == 2
    assert run("emit", *WINDOW, "--binaries", "x.py").status == 2
    assert run("emit", *WINDOW, "--heads", "4,3", "--binaries", str(tmp_path / "x.zip")).status == 2
    done = run("emit", "landmark", "--binaries", str(tmp_path / "x.zip"))
    assert done.status == 2
    assert "has no kernels" in done.err
    assert not (tmp_path / "x.zip").exists()
