"""`compile_attention` and the Attention that it returns: calls, errors, and documented guarantees."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp, vmap

import attnc
from attnc import ArgumentError, ArgumentTypeError, PatternNotFoundError, SpecError, UnsupportedError, compile_attention
from attnc.compiler.planning.rates import AMX
from attnc.runtime.planning import stored_rates

WINDOW = "pattern near(window: int = 3)\n    align end\n    visible 0 <= q - k < window\n"
NO_ALIGN = "pattern p\n    visible k <= q\n"


def tensors(n_q: int = 9, n_k: int | None = None, heads: int = 4, kv_heads: int | None = None) -> list[Tensor]:
    n_k = n_q if n_k is None else n_k
    shapes = ((heads, n_q), (kv_heads or heads, n_k), (kv_heads or heads, n_k))
    return [torch.randn(2, h, n, 8) for h, n in shapes]


# --- finding a spec ---


def test_sources_files_and_library_names_are_distinguished(tmp_path: Path) -> None:
    path = tmp_path / "near.attn"
    path.write_text(WINDOW)
    for spec in (WINDOW, path, str(path), f"{path}:near"):
        assert compile_attention(spec, window=2).parameters == {"window": 2}
    assert compile_attention("causal").name == "causal"


def test_use_finds_a_module_beside_the_file_and_then_in_the_library(tmp_path: Path) -> None:
    text = "use {module} ({name})\n\npattern p\n    visible {name}(q, k, queries, 3)\n"
    (tmp_path / "mine.attn").write_text("def close(x, y, length, w) = abs(x - y) < w\n")
    (tmp_path / "a.attn").write_text(text.format(module="mine", name="close"))
    (tmp_path / "b.attn").write_text(text.format(module="windows", name="shifted"))
    assert compile_attention(tmp_path / "a.attn").mask(5)[0].tolist() == [True, True, True, False, False]
    assert compile_attention(tmp_path / "b.attn").mask(5)[0].tolist() == [True, True, True, False, False]


@pytest.mark.parametrize(
    "written", ["../secret", "folder.secret", "folder/secret", '"secret"', "/etc/passwd", "secret"]
)
def test_modules_outside_of_the_search_path_are_not_read(written: str, tmp_path: Path) -> None:
    """Neither a path nor a link that leads out of the folder reaches a module elsewhere."""
    (tmp_path / "secret.attn").write_text("def hidden(x) = x\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "secret.attn").symlink_to(tmp_path / "secret.attn")
    (folder / "p.attn").write_text(f"use {written} (hidden)\n\npattern p\n    visible hidden(q) >= k\n")
    with pytest.raises(SpecError) as raised:
        compile_attention(folder / "p.attn")
    assert "hidden(x)" not in str(raised.value)


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ("slidin_window", PatternNotFoundError, "did you mean `sliding_window`"),
        ("nowhere.attn", PatternNotFoundError, "cannot read nowhere.attn"),
        (3, ArgumentTypeError, "spec is int"),
        ("\n", SpecError, "the text is empty"),
    ],
)
def test_a_missing_spec(spec: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        compile_attention(spec)


def test_options_are_checked() -> None:
    with pytest.raises(ArgumentError, match="backend is 'gpu'"):
        compile_attention("causal", backend="gpu")  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="strict"):
        compile_attention("causal", strict=1)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="tune"):
        compile_attention("causal", tune="max-autotune")


def test_kernels_need_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="Triton is not installed"):
        compile_attention("causal", backend="triton")


# --- the call ---


@pytest.mark.parametrize("make", [lambda q, k, v: (q[0], k, v), lambda q, k, v: (q, k[..., 0], v)])
def test_wrong_rank(make: Any) -> None:
    with pytest.raises(ArgumentError, match="must have 4"):
        compile_attention("causal")(*make(*tensors()))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda q, k, v: (q, k[:, :3], v[:, :3]), ArgumentError, "q has 4 heads .* multiple of kv heads"),
        (lambda q, k, v: (q, k[:1], v[:1]), ArgumentError, "q and k disagree on the batch"),
        (lambda q, k, v: (q, k[..., :5], v), ArgumentError, "disagree on the head dimension"),
        (lambda q, k, v: (q, k, v[:, :, :5]), ArgumentError, "k and v disagree on the keys"),
        (lambda q, k, v: (q.double(), k, v), ArgumentTypeError, "differ in dtype"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), ArgumentTypeError, "q has dtype int32"),
        (lambda q, k, v: (q.numpy(), k, v), ArgumentTypeError, "q is ndarray"),
        (lambda q, k, v: (q.to_sparse(), k, v), ArgumentTypeError, "dense"),
        (lambda q, k, v: (q[:, :, :, :0], k[..., :0], v), ArgumentError, "head dimension 0"),
    ],
)
def test_tensors_that_do_not_match(change: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        compile_attention("causal")(*change(*tensors()))


def test_unequal_lengths_need_align() -> None:
    q, k, v = tensors(4, 9)
    with pytest.raises(ArgumentError, match=r"query 0 at key 5.*align start"):
        compile_attention(NO_ALIGN)(q, k, v)
    last = compile_attention("causal")(q, k, v)
    full_output = compile_attention("causal")(torch.cat([torch.zeros(2, 4, 5, 8), q], 2), k, v)
    torch.testing.assert_close(last, full_output[:, :, 5:])
    first = compile_attention(NO_ALIGN.replace("p\n", "p\n    align start\n"))(q, k, v)
    torch.testing.assert_close(first, compile_attention("causal")(q, k[:, :, :4], v[:, :, :4]))


def test_a_relation_of_one_position_needs_no_align() -> None:
    attend = compile_attention("pattern p\n    visible k < 3\n")
    assert attend.mask(2, 5).tolist() == [[True, True, True, False, False]] * 2


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"attn_mask": torch.ones(9, 9)}, "attn_mask"),
        ({"is_causal": True}, "is_causal"),
        ({"dropout_p": 0.1}, "dropout_p"),
        ({"state": torch.zeros(1)}, "has no state"),
        ({"return_state": True}, "has no state"),
    ],
)
def test_refused_options(option: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        compile_attention("causal")(*tensors(), **option)


def test_disabled_options_are_accepted() -> None:
    compile_attention("causal")(*tensors(), dropout_p=0.0, is_causal=False, attn_mask=None)


@pytest.mark.parametrize(
    ("scale", "error"), [("a", ArgumentTypeError), (float("nan"), ArgumentError), (True, ArgumentTypeError)]
)
def test_scale_is_checked(scale: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="scale"):
        compile_attention("causal")(*tensors(), scale=scale)


def test_inputs_are_checked() -> None:
    q, k, v = tensors()
    attend = compile_attention("document")
    for doc, error, says in (
        (None, ArgumentTypeError, "needs the input `doc`"),
        (torch.zeros(2, 8, dtype=torch.long), ArgumentError, r"size 8 in dimension 1 \(`token`\)"),
        (torch.zeros(2, 9), ArgumentTypeError, "dtype float32"),
        (torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0, 0]] * 2), ArgumentError, "id 0 reappears at position 6"),
    ):
        with pytest.raises(error, match=says):
            attend(q, k, v, doc=doc)
    with pytest.raises(ArgumentTypeError, match="did you mean `doc`"):
        attend(q, k, v, docs=torch.zeros(2, 9))


def test_lists_by_head_and_requirements_of_the_call() -> None:
    text = "pattern p(window: int[head])\n    align end\n    require keys >= 4\n    visible 0 <= q - k < window\n"
    attend = compile_attention(text, window=[1, 2, 3, 9])
    assert attend.mask(9, head=1).sum() == 17
    with pytest.raises(ArgumentError, match="has 4 entries"):
        attend(*tensors(heads=2))
    with pytest.raises(SpecError, match="A805"):
        attend(*tensors(3))


def test_lengths_of_segments() -> None:
    text = "pattern p(h: int)\n    tokens a(y: h, x: 3)\n    tokens b(i: words)\n"
    text += "    visible q in b or k in b or q.y == k.y\n"
    attend = compile_attention(text, h=2)
    assert attend.mask(8).sum() == 2 * 9 + 2 * 12 + 4
    with pytest.raises(ArgumentError, match="words"):
        attend.mask(5)


# --- guarantees -


def test_rows_without_keys() -> None:
    attend = compile_attention("pattern p\n    align end\n    visible k < q - 2\n")
    q, k, v = (t.requires_grad_() for t in tensors(7))
    for run in (attend, attend.reference):
        out, lse = run(q, k, v, return_lse=True)
        assert torch.equal(out[:, :, :3], torch.zeros(2, 4, 3, 8))
        assert torch.equal(lse[:, :, :3], torch.full((2, 4, 3), -torch.inf))
        grads = torch.autograd.grad((out * 3).sum() + lse[:, :, 3:].sum(), (q, k, v))
        assert all(torch.isfinite(g).all() for g in grads)
        assert torch.equal(grads[0][:, :, :3], torch.zeros(2, 4, 3, 8))


@pytest.mark.parametrize("n", [0, 1])
def test_tiny_lengths(n: int) -> None:
    q, k, v = (t.requires_grad_() for t in tensors(n))
    out, lse = compile_attention("sliding_window", window=2)(q, k, v, return_lse=True)
    assert out.shape == (2, 4, n, 8)
    assert lse.shape == (2, 4, n)
    torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))


def test_calls_are_bitwise_repeatable_and_threads_agree() -> None:
    attend = compile_attention("sliding_window", window=50, sinks=3)
    q, k, v = tensors(300)
    first = attend(q, k, v)
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(attend(q, k, v))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(torch.equal(first, other) for other in results)


def test_pickling_keeps_spec_parameters_options_and_modules(tmp_path: Path) -> None:
    (tmp_path / "mine.attn").write_text("def close(x, y, w) = abs(x - y) < w\n")
    path = tmp_path / "p.attn"
    path.write_text("use mine (close)\n\npattern p(w: int, ratio: real = 0.2)\n    visible close(q, k, w)\n")
    attend = compile_attention(path, w=2, strict=True)
    data = pickle.dumps(attend)
    for file in tmp_path.iterdir():
        file.unlink()
    copy = pickle.loads(data)
    assert copy.parameters == attend.parameters
    assert torch.equal(copy.mask(6), attend.mask(6))


def test_autocast() -> None:
    q, k, v = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = compile_attention("causal")(q, k.bfloat16(), v)
    assert out.dtype == torch.bfloat16


def test_transforms_are_refused_and_the_reference_takes_them() -> None:
    attend = compile_attention("sliding_window", window=3)
    dense = compile_attention("sliding_window", window=3, backend="reference")
    q, k, v = (t.double() for t in tensors(5))
    batch = torch.stack([q, q + 1])
    with pytest.raises(UnsupportedError, match="vmap"):
        vmap(lambda x: attend(x, k, v))(batch)
    torch.testing.assert_close(vmap(lambda x: dense(x, k, v))(batch)[1], dense(q + 1, k, v))
    with pytest.raises(UnsupportedError, match="forward-mode"):
        jvp(lambda x: attend(x, k, v), (q,), (q,))
    assert jvp(lambda x: dense(x, k, v), (q,), (q,))[1].shape == q.shape


def test_second_derivatives_are_refused_and_the_reference_has_them() -> None:
    q, k, v = (t[:1, :1].double().requires_grad_() for t in tensors(4))
    (grad,) = torch.autograd.grad(compile_attention("causal")(q, k, v).sin().sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivatives"):
        torch.autograd.grad(grad.sum(), q)
    dense = compile_attention("causal", backend="reference")
    assert torch.autograd.gradgradcheck(dense, (q, k, v))
    assert torch.autograd.gradcheck(lambda *t: dense(*t, return_lse=True), (q, k, v))


def test_the_cpu_executor_passes_gradcheck_through_out_and_lse() -> None:
    q, k, v = (t[:1, :2].double().requires_grad_() for t in tensors(6))
    attend = compile_attention("sliding_window", window=2, sinks=1)
    assert torch.autograd.gradcheck(lambda *t: attend(*t, return_lse=True), (q, k, v))


def test_strict_refuses_patterns_without_a_tile_plan() -> None:
    text = "pattern p\n    input x: int[token]\n    visible x[q] == x[k]\n"
    x = torch.randint(0, 1000, (8192,))
    assert compile_attention(text).plan(8192, x=x).schedule == "dense by row blocks"
    with pytest.raises(UnsupportedError, match=r"strict: .*no tile plan"):
        compile_attention(text, strict=True).plan(8192, x=x)


def test_plans_print_and_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_rates, "rates", lambda: AMX)
    attend = compile_attention("sliding_window", window=512)
    plan = attend.plan(4096, heads=4)
    assert attend.plan(4096, heads=4) is plan
    assert "tiles 128×128: 600 live of 4096 (360 full, 240 partial)" in str(plan)
    assert plan.visible == 4 * (4096 * 512 - 512 * 511 // 2)
    assert len(plan.groups[0].pieces) == 2


def test_other_sizes_of_a_plan_are_checked() -> None:
    attend = compile_attention("causal")
    refused: list[dict[str, Any]] = [{"heads": 0}, {"heads": 4, "kv_heads": 3}, {"head_dim": 0}, {"batch": -1}]
    for options in refused:
        with pytest.raises(ArgumentError):
            attend.plan(16, **options)
    with pytest.raises(ArgumentTypeError):
        attend.plan(16.0)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="device=mps"):
        attend.plan(16, device="mps")


def test_plans_for_a_gpu_state_the_tiles_of_its_kernels() -> None:
    plan = compile_attention("sliding_window", window=512).plan(4096, heads=2, device="cuda", dtype=torch.bfloat16)
    assert (plan.executor, plan.schedule, plan.fallback) == ("triton", "loop bounds", None)
    assert plan.visible == 2 * (512 * 513 // 2 + (4096 - 512) * 512)
    assert plan.tiles.live == plan.tiles.full + plan.tiles.partial < plan.tiles.total
    bricks = compile_attention("neighborhood_2d", height=32, width=32).plan(1024, device="cuda", dtype=torch.bfloat16)
    lists = compile_attention("power").plan(4096, device="cuda", dtype=torch.bfloat16)
    assert (bricks.schedule, lists.schedule) == ("bricks", "tile lists")
    without = compile_attention("landmark").plan(256, device="cuda")
    assert "no kernels for weights" in str(without.fallback)
    with pytest.raises(UnsupportedError, match="strict: `landmark` has no kernels"):
        compile_attention("landmark", strict=True).plan(256, device="cuda")


def test_sources_of_kernels() -> None:
    alibi = compile_attention("alibi")
    stages = ("forward", "delta", "dq", "dkdv", "decode", "merge")
    assert list(alibi.source("sm_80")) == [f"alibi_{stage}" for stage in stages]
    assert "fox_decode" not in compile_attention("fox").source()
    assert "box" in alibi.source()["alibi_forward"]
    assert "box" not in alibi.source("sm_80")["alibi_forward"]
    assert alibi.source(head_dim=128) != alibi.source()
    with pytest.raises(ArgumentError, match="did you mean `sm_90`"):
        alibi.source("sm90")
    with pytest.raises(UnsupportedError, match="keys that the pattern computes"):
        compile_attention("attention_residual").source()


GRIDS: dict[str, Any] = {"frames": 3, "height": 4, "width": 10}


@pytest.mark.parametrize("name", ["vmoba", "vmoba_threshold", "vsa"])
def test_sources_of_selections_on_a_grid(name: str) -> None:
    texts = compile_attention(name, **GRIDS).source("sm_90")
    assert any(kernel.endswith(f"{name}_dkdv") for kernel in texts)


@pytest.mark.parametrize("reads", ["seen: bool[batch, key]", "reach: int[batch, query]"])
def test_sources_on_a_grid_that_read_inputs(reads: str) -> None:
    """Bricks are found before inputs are known."""
    near = "seen[k] and abs(q.y - k.y) <= 2" if "seen" in reads else "abs(q.y - k.y) <= reach[q]"
    text = f"""pattern near
    tokens  y: 16, x: 24
    input   {reads}
    visible {near} and abs(q.x - k.x) <= 3
"""
    assert "near_dkdv" in compile_attention(text).source("sm_90")


@pytest.mark.parametrize(
    ("name", "kernel"), [("monarch_rt", "inner_k[2].monarch_rt_dkdv"), ("mhs_vm", "scan_real"), ("spatial_mamba", None)]
)
def test_sources_of_grids_of_other_lengths(name: str, kernel: str | None) -> None:
    """A grid fixes the number of tokens of a call."""
    extents: dict[str, Any] = {key: size for key, size in GRIDS.items() if name == "monarch_rt" or key != "frames"}
    texts = compile_attention(name, **extents).source("sm_90")
    assert texts and (kernel is None or kernel in texts)


def test_a_picture_needs_a_length() -> None:
    with pytest.raises(ArgumentTypeError, match="n is '64'"):
        compile_attention("causal").picture("64")  # type: ignore[arg-type]
    assert compile_attention("causal").picture(8).startswith("<svg")


@pytest.mark.parametrize("name", ["causal", "sliding_window", "alibi", "moba"])
@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_a_scale_that_is_not_positive(name: str, scale: float) -> None:
    """Hidden keys stay hidden, although torch's kernel multiplies the mask by the scale."""
    params: dict[str, Any] = {"sliding_window": {"window": 5}, "moba": {"block": 8}}.get(name, {})
    attend = compile_attention(name, **params)
    q, k, v = (torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3))
    results = [run(q, k, v, scale=scale) for run in (attend, attend.reference)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in results]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_public_names() -> None:
    for name in attnc.__all__:
        assert getattr(attnc, name) is not None
    with pytest.raises(AttributeError):
        attnc.nothing  # noqa: B018  the access is the test


NO_ENTRIES = {
    "gates": "pattern p\n    input g: log_decay[batch, token, head]\n    align end\n    visible k <= q\n"
    "    score scale * dot(q, k) + sum(g[j] for j in k + 1 .. q + 1)\n",
    "documents": "pattern p\n    input doc: int[batch, token]\n    align end\n    documents doc\n    visible k <= q\n"
    "    score scale * dot(q, k) + 0.75 ** abs(q - k)\n",
    "reset": "recurrence p\n    input fresh: bool[batch, token]\n    input beta: unit[batch, token, head]\n"
    "    state S: [dk, dv]\n    reset fresh\n    step S = S + beta * outer(k, v - k @ S)\n    read q @ S\n",
}


@pytest.mark.parametrize("kind", NO_ENTRIES)
def test_calls_without_batch_entries(kind: str) -> None:
    """`make hunt`, part cpu, cases 119, 131, 142 and 148: these calls raised, or lost their gradient."""
    attend = compile_attention(NO_ENTRIES[kind])
    q, k, v = (torch.randn(0, 2, 9, width, requires_grad=True) for width in (4, 4, 3))
    inputs: dict[str, Any] = {
        "gates": {"g": torch.zeros(0, 9, 2)},
        "documents": {"doc": torch.zeros(0, 9, dtype=torch.long)},
        "reset": {"fresh": torch.zeros(0, 9, dtype=torch.bool), "beta": torch.zeros(0, 9, 2)},
    }[kind]
    out = attend(q, k, v, **inputs)
    assert out.shape == (0, 2, 9, 3)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]
