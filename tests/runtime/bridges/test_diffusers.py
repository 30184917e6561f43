"""Video transformers of Diffusers whose attention is replaced by a pattern."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import ArgumentError, ArgumentTypeError, PatternNotFoundError, UnsupportedError, bridges, compile_attention
from tiny_models import GRID, cogvideox, hunyuan, ltx, wan

pytest.importorskip("diffusers", reason="Diffusers is not installed: pip install 'attnc[interop]'")

Model = Callable[[], "tuple[Any, dict[str, Any]]"]
MODELS: list[Model] = [wan, hunyuan, cogvideox, ltx]
TEXT = {wan: 0, hunyuan: 7, cogvideox: 5, ltx: 0}
VIDEO = 72
PATTERNS: list[tuple[str, dict[str, Any]]] = [
    ("neighborhood_3d", {"window": 3}),
    ("radial", {"block": 4}),
    ("sliding_tile", {"tile": [1, 2, 2], "kernel": [1, 2, 4]}),
]

by_name = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)


def assert_near(output: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-5)


def result(model: Any, call: dict[str, Any]) -> Any:
    return model(**call).sample


def replaced(model: Any) -> list[str]:
    return [
        name
        for name, transformer in model.attn_processors.items()
        if isinstance(transformer, bridges.DiffusersProcessor)
    ]


def sdpa_with_mask(mask: Tensor) -> Callable[..., Tensor]:
    """Return torch's SDPA with a mask between video tokens, combined with the mask that the call passes."""
    dense = torch.nn.functional.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if query.shape[2] == key.shape[2] == len(mask):
            attn_mask = mask if attn_mask is None else mask & attn_mask
        return dense(query, key, value, attn_mask=attn_mask, **options)

    return attend


def mask_with_text(video: Tensor, text: int, *, first: bool) -> Tensor:
    """Return the mask of a video, extended by text tokens that see every token and that every token sees."""
    mask = torch.ones(VIDEO + text, VIDEO + text, dtype=torch.bool)
    positions = slice(text, None) if first else slice(VIDEO)
    mask[positions, positions] = video
    return mask


def of_grid(name: str, params: dict[str, Any]) -> Any:
    frames, height, width = GRID
    if name == "radial":
        return compile_attention(name, frames=frames, per_frame=height * width, **params)
    return compile_attention(name, frames=frames, height=height, width=width, **params)


# --- agreement with other attention ----------------------------------------------------------------------------------


@by_name
def test_full_equals_the_unchanged_model(model: Model) -> None:
    transformer, call = model()
    with torch.no_grad():
        expected = result(transformer, call)
        before = bridges.install_diffusers(transformer, "full")
        assert len(replaced(transformer)) == 2
        assert_near(result(transformer, call), expected)
        transformer.set_attn_processor(before)
        assert not replaced(transformer)
        assert torch.equal(result(transformer, call), expected)


@by_name
@pytest.mark.parametrize(("name", "params"), PATTERNS, ids=[name for name, _ in PATTERNS])
def test_patterns_are_dense_attention_with_their_mask(
    model: Model, name: str, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call gives the grid. Every token sees the text; only `sliding_tile` states this in its own pattern."""
    transformer, call = model()
    attend = of_grid(name, params)
    mask = mask_with_text(attend.mask(VIDEO), TEXT[model], first=model is cogvideox)
    assert not mask.all()
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", sdpa_with_mask(mask))
            expected = result(transformer, call)
        bridges.install_diffusers(transformer, name, **params)
        assert_near(result(transformer, call), expected)
        bridges.install_diffusers(transformer, attend)
        assert len(transformer._forward_pre_hooks) == 1, "one hook follows the grid, however often a pattern is put in"
        assert_near(result(transformer, call), expected)
        bridges.install_diffusers(transformer, name, grid=GRID, **params)
        assert_near(result(transformer, call), expected)


def test_neighbours_against_a_mask_written_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask is written by hand: the three nearest positions along each axis, shifted inward at the edges."""
    positions = torch.arange(VIDEO)
    mask = torch.ones(VIDEO, VIDEO, dtype=torch.bool)
    for place, extent in zip((positions // 24, positions // 6 % 4, positions % 6), GRID, strict=True):
        first = (place - 1).clamp(0, extent - 3)
        mask &= (place[None] >= first[:, None]) & (place[None] < first[:, None] + 3)
    transformer, call = wan()
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", sdpa_with_mask(mask))
            expected = result(transformer, call)
        bridges.install_diffusers(transformer, "neighborhood_3d", window=3)
        assert_near(result(transformer, call), expected)


@by_name
def test_gradients(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    transformer, call = model()
    mask = mask_with_text(of_grid("neighborhood_3d", {"window": 3}).mask(VIDEO), TEXT[model], first=model is cogvideox)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", sdpa_with_mask(mask))
        result(transformer, call).square().sum().backward()
    expected = {name: p.grad for name, p in transformer.named_parameters()}
    transformer.zero_grad()
    bridges.install_diffusers(transformer, "neighborhood_3d", window=3)
    result(transformer, call).square().sum().backward()
    for name, parameter in transformer.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-3, msg=f"{name} differs")


def test_training_learns() -> None:
    transformer, call = wan()
    bridges.install_diffusers(transformer, "neighborhood_3d", window=3)
    transformer.train().enable_gradient_checkpointing()
    optimiser = torch.optim.Adam(transformer.parameters(), lr=0.01)
    target, losses = torch.randn_like(call["hidden_states"]), []
    for _ in range(10):
        optimiser.zero_grad()
        loss = (result(transformer, call) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses


def test_the_grid_is_read_from_each_call() -> None:
    transformer, call = wan()
    bridges.install_diffusers(transformer, "neighborhood_3d", window=2)
    fixed, _ = wan()
    other_size = {**call, "hidden_states": torch.randn(2, 4, 2, 12, 8)}
    bridges.install_diffusers(fixed, "neighborhood_3d", window=2, grid=(2, 6, 4))
    with torch.no_grad():
        result(transformer, call)
        assert torch.equal(result(transformer, other_size), result(fixed, other_size))
        again = copy.deepcopy(transformer)
        assert result(again, call).shape == call["hidden_states"].shape
        assert torch.equal(result(again, other_size), result(transformer, other_size))


def test_replacing_some_layers() -> None:
    """The first layer keeps its own attention, as papers leave it dense."""
    transformer, call = wan()
    with torch.no_grad():
        expected = result(transformer, call)
        bridges.install_diffusers(transformer, "neighborhood_3d", window=2, attentions=["blocks.1."])
        assert replaced(transformer) == ["blocks.1.attn1.processor"]
        assert not torch.allclose(result(transformer, call), expected, atol=1e-3)
        before = bridges.install_diffusers(transformer, "full", attentions=["blocks.1."])
        assert_near(result(transformer, call), expected)
        assert not any(isinstance(processor, bridges.DiffusersProcessor) for processor in before.values())
    with pytest.raises(ArgumentError, match=r"no self-attention whose name starts with 'block\.1\.'"):
        bridges.install_diffusers(transformer, "full", attentions=["block.1."])
    with pytest.raises(ArgumentTypeError, match="pass a list"):
        bridges.install_diffusers(transformer, "full", attentions="blocks.1.")


@pytest.mark.parametrize("model", [wan, hunyuan], ids=lambda model: model.__name__)
def test_torch_compile_runs_between_graphs(model: Model) -> None:
    transformer, call = model()
    bridges.install_diffusers(transformer, "neighborhood_3d", window=3)
    fast = torch.compile(transformer, backend="eager")
    with torch.no_grad():
        assert_near(result(fast, call), result(transformer, call))


# --- errors ----------------------------------------------------------------------------------------------------------


def test_install_refuses_wrong_arguments() -> None:
    transformer, _ = wan()
    install = bridges.install_diffusers
    with pytest.raises(PatternNotFoundError, match="did you mean `neighborhood_3d`"):
        install(transformer, "neighbourhood_3d")
    with pytest.raises(ArgumentTypeError, match="`neighborhood_3d` has no parameter `windw`: did you mean `window`"):
        install(transformer, "neighborhood_3d", windw=3)
    with pytest.raises(UnsupportedError, match="needs the input `temporal`"):
        install(transformer, "svg", grid=GRID, block=8)
    with pytest.raises(UnsupportedError, match="`retention` has a state"):
        install(transformer, "retention", grid=GRID)
    with pytest.raises(ArgumentError, match=r"grid is \(4, 6\): it must be frames, height and width"):
        install(transformer, "full", grid=(4, 6))
    with pytest.raises(ArgumentError, match="text is 'before'"):
        install(transformer, "full", text="before")  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="of a pipeline, pass its transformer"):
        install(torch.nn.Linear(2, 2), "full", grid=GRID)
    with pytest.raises(ArgumentTypeError, match="`window` cannot be set for `full`, which is compiled"):
        install(transformer, compile_attention("full"), window=3)
    assert not replaced(transformer)


def test_a_grid_that_does_not_match_the_tokens_is_refused() -> None:
    transformer, call = wan()
    bridges.install_diffusers(transformer, of_grid("neighborhood_3d", {"window": 3}))
    with pytest.raises(ArgumentError, match="has 72 tokens, but the video has 2×4×6 = 48 after patching"):
        result(transformer, {**call, "hidden_states": torch.randn(2, 4, 2, 8, 12)})
    bridges.install_diffusers(transformer, "full", grid=(3, 8, 12))
    with pytest.raises(ArgumentError, match="over 72 tokens, but the grid has 288: pass the grid in tokens"):
        result(transformer, call)
    bridges.install_diffusers(transformer, "full", grid=(3, 4, 5))
    with pytest.raises(ArgumentError, match="12 more than the grid's 60: if these are a text"):
        result(transformer, call)


def test_an_unknown_model_needs_a_grid_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image model has a grid of one frame; a pattern with two axes takes its height and width."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 4),
    ).eval()
    call = {
        "hidden_states": torch.randn(2, 20, 4),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "pooled_projections": torch.randn(2, 8),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": torch.zeros(20, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    with pytest.raises(ArgumentError, match=r"FluxTransformer2DModel is not a known model .*pass grid="):
        bridges.install_diffusers(model, "full")
    with torch.no_grad():
        expected = result(model, call)
        before = bridges.install_diffusers(model, "full", grid=(1, 4, 5), text="first")
        assert_near(result(model, call), expected)
        bridges.install_diffusers(model, "neighborhood_2d", grid=(1, 4, 5), text="first", window=3)
        output = result(model, call)
        mask = torch.ones(25, 25, dtype=torch.bool)
        mask[5:, 5:] = compile_attention("neighborhood_2d", height=4, width=5, window=3).mask(20)
        model.set_attn_processor(before)
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", sdpa_with_mask(mask))
        assert_near(output, result(model, call))


@pytest.mark.parametrize("model", [wan, hunyuan, ltx], ids=lambda model: model.__name__)
def test_attention_backends_set_for_the_process_are_ignored(model: Model) -> None:
    """A backend set on a model holds for the whole process, also after the model is reset; a pattern ignores it."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    transformer, call = model()
    with torch.no_grad():
        before = bridges.install_diffusers(transformer, "neighborhood_3d", window=3)
        expected = result(transformer, call)
        transformer.set_attn_processor(before)
        try:
            transformer.set_attention_backend("flex")
            bridges.install_diffusers(transformer, "neighborhood_3d", window=3)
            assert_near(result(transformer, call), expected)  # the attention to the text tokens runs by flex_attention
            transformer.set_attention_backend("flex")
            assert_near(result(transformer, call), expected)  # the attention to the text tokens runs by flex_attention
        finally:
            _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    backends = {x.own._attention_backend for x in transformer.attn_processors.values() if hasattr(x, "own")}
    assert backends == {AttentionBackendName.FLEX}  # unchanged after the pattern is removed


def test_processors_that_do_not_call_sdpa_are_refused() -> None:
    transformer, call = wan()
    bridges.install_diffusers(transformer, "full")

    class Other:
        def __call__(self, attn: Any, hidden_states: Tensor, *rest: Any) -> Tensor:
            return hidden_states

    for processor in transformer.attn_processors.values():
        if isinstance(processor, bridges.DiffusersProcessor):
            processor.own = Other()
    says = r"Other called .* 0 times, expected one: call the model within diffusers\.attention_backend\(\"native\"\)"
    with torch.no_grad(), pytest.raises(UnsupportedError, match=says):
        result(transformer, call)
