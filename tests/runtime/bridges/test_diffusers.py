"""Video transformers of Diffusers with a pattern in their attention."""

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


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def result(model: Any, call: dict[str, Any]) -> Any:
    return model(**call).sample


def replaced(model: Any) -> list[str]:
    return [name for name, own in model.attn_processors.items() if isinstance(own, bridges.DiffusersProcessor)]


def masked(mask: Tensor) -> Callable[..., Tensor]:
    """Attention of torch where all of these tokens see each other as a mask says, besides what the call says."""
    dense = torch.nn.functional.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if query.shape[2] == key.shape[2] == len(mask):
            attn_mask = mask if attn_mask is None else mask & attn_mask
        return dense(query, key, value, attn_mask=attn_mask, **options)

    return attend


def with_text(video: Tensor, text: int, *, first: bool) -> Tensor:
    """A mask of a video, beside a text that sees all and that all see."""
    mask = torch.ones(VIDEO + text, VIDEO + text, dtype=torch.bool)
    at = slice(text, None) if first else slice(VIDEO)
    mask[at, at] = video
    return mask


def of_grid(name: str, params: dict[str, Any]) -> Any:
    frames, height, width = GRID
    if name == "radial":
        return compile_attention(name, frames=frames, per_frame=height * width, **params)
    return compile_attention(name, frames=frames, height=height, width=width, **params)


# --- the same as other ways ------------------------------------------------------------------------------------------


@by_name
def test_full_is_the_model_itself(model: Model) -> None:
    own, call = model()
    with torch.no_grad():
        expected = result(own, call)
        before = bridges.install_diffusers(own, "full")
        assert len(replaced(own)) == 2
        near(result(own, call), expected)
        own.set_attn_processor(before)
        assert not replaced(own)
        assert torch.equal(result(own, call), expected)


@by_name
@pytest.mark.parametrize(("name", "params"), PATTERNS, ids=[name for name, _ in PATTERNS])
def test_patterns_are_dense_attention_with_their_mask(
    model: Model, name: str, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grid comes from the call. A text is seen by all, as `sliding_tile` says itself."""
    own, call = model()
    attend = of_grid(name, params)
    mask = with_text(attend.mask(VIDEO), TEXT[model], first=model is cogvideox)
    assert not mask.all()
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", masked(mask))
            expected = result(own, call)
        bridges.install_diffusers(own, name, **params)
        near(result(own, call), expected)
        bridges.install_diffusers(own, attend)
        assert len(own._forward_pre_hooks) == 1, "one hook follows the grid, however often a pattern is put in"
        near(result(own, call), expected)
        bridges.install_diffusers(own, name, grid=GRID, **params)
        near(result(own, call), expected)


def test_neighbours_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The three nearest places of every axis, moved inward at the edges: no text of ours says which these are."""
    at = torch.arange(VIDEO)
    mask = torch.ones(VIDEO, VIDEO, dtype=torch.bool)
    for place, extent in zip((at // 24, at // 6 % 4, at % 6), GRID, strict=True):
        first = (place - 1).clamp(0, extent - 3)
        mask &= (place[None] >= first[:, None]) & (place[None] < first[:, None] + 3)
    own, call = wan()
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", masked(mask))
            expected = result(own, call)
        bridges.install_diffusers(own, "neighborhood_3d", window=3)
        near(result(own, call), expected)


@by_name
def test_gradients(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    own, call = model()
    mask = with_text(of_grid("neighborhood_3d", {"window": 3}).mask(VIDEO), TEXT[model], first=model is cogvideox)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", masked(mask))
        result(own, call).square().sum().backward()
    expected = {name: p.grad for name, p in own.named_parameters()}
    own.zero_grad()
    bridges.install_diffusers(own, "neighborhood_3d", window=3)
    result(own, call).square().sum().backward()
    for name, parameter in own.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-3, msg=f"{name} differs")


def test_training_learns() -> None:
    own, call = wan()
    bridges.install_diffusers(own, "neighborhood_3d", window=3)
    own.train().enable_gradient_checkpointing()
    optimiser = torch.optim.Adam(own.parameters(), lr=0.01)
    target, losses = torch.randn_like(call["hidden_states"]), []
    for _ in range(10):
        optimiser.zero_grad()
        loss = (result(own, call) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses


def test_the_grid_follows_the_call() -> None:
    own, call = wan()
    bridges.install_diffusers(own, "neighborhood_3d", window=2)
    fixed, _ = wan()
    other = {**call, "hidden_states": torch.randn(2, 4, 2, 12, 8)}
    bridges.install_diffusers(fixed, "neighborhood_3d", window=2, grid=(2, 6, 4))
    with torch.no_grad():
        result(own, call)
        assert torch.equal(result(own, other), result(fixed, other))
        again = copy.deepcopy(own)
        assert result(again, call).shape == call["hidden_states"].shape
        assert torch.equal(result(again, other), result(own, other))


def test_some_layers() -> None:
    """The first layer stays as it is, as papers leave it."""
    own, call = wan()
    with torch.no_grad():
        expected = result(own, call)
        bridges.install_diffusers(own, "neighborhood_3d", window=2, attentions=["blocks.1."])
        assert replaced(own) == ["blocks.1.attn1.processor"]
        assert not torch.allclose(result(own, call), expected, atol=1e-3)
        before = bridges.install_diffusers(own, "full", attentions=["blocks.1."])
        near(result(own, call), expected)
        assert not any(isinstance(processor, bridges.DiffusersProcessor) for processor in before.values())
    with pytest.raises(ArgumentError, match=r"no self-attention whose name starts with 'block\.1\.'"):
        bridges.install_diffusers(own, "full", attentions=["block.1."])
    with pytest.raises(ArgumentTypeError, match="pass a list"):
        bridges.install_diffusers(own, "full", attentions="blocks.1.")


@pytest.mark.parametrize("model", [wan, hunyuan], ids=lambda model: model.__name__)
def test_torch_compile_runs_between_graphs(model: Model) -> None:
    own, call = model()
    bridges.install_diffusers(own, "neighborhood_3d", window=3)
    fast = torch.compile(own, backend="eager")
    with torch.no_grad():
        near(result(fast, call), result(own, call))


# --- refused ---------------------------------------------------------------------------------------------------------


def test_installing_refuses() -> None:
    own, _ = wan()
    install = bridges.install_diffusers
    with pytest.raises(PatternNotFoundError, match="did you mean `neighborhood_3d`"):
        install(own, "neighbourhood_3d")
    with pytest.raises(ArgumentTypeError, match="`neighborhood_3d` has no parameter `windw`: did you mean `window`"):
        install(own, "neighborhood_3d", windw=3)
    with pytest.raises(UnsupportedError, match="needs the input `temporal`"):
        install(own, "svg", grid=GRID, block=8)
    with pytest.raises(UnsupportedError, match="`retention` has a state"):
        install(own, "retention", grid=GRID)
    with pytest.raises(ArgumentError, match=r"grid is \(4, 6\): it must be frames, height and width"):
        install(own, "full", grid=(4, 6))
    with pytest.raises(ArgumentError, match="text is 'before'"):
        install(own, "full", text="before")  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="of a pipeline, pass its transformer"):
        install(torch.nn.Linear(2, 2), "full", grid=GRID)
    with pytest.raises(ArgumentTypeError, match="`window` cannot be set for `full`, which is compiled"):
        install(own, compile_attention("full"), window=3)
    assert not replaced(own)


def test_a_grid_that_does_not_fit() -> None:
    own, call = wan()
    bridges.install_diffusers(own, of_grid("neighborhood_3d", {"window": 3}))
    with pytest.raises(ArgumentError, match="has 72 tokens, but the video has 2×4×6 = 48 after patching"):
        result(own, {**call, "hidden_states": torch.randn(2, 4, 2, 8, 12)})
    bridges.install_diffusers(own, "full", grid=(3, 8, 12))
    with pytest.raises(ArgumentError, match="over 72 tokens, but the grid has 288: pass the grid in tokens"):
        result(own, call)
    bridges.install_diffusers(own, "full", grid=(3, 4, 5))
    with pytest.raises(ArgumentError, match="12 more than the grid's 60: if these are a text"):
        result(own, call)


def test_models_that_are_not_known_say_their_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of pictures: a grid of one frame, whose height and width a pattern of two axes takes."""
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
        near(result(model, call), expected)
        bridges.install_diffusers(model, "neighborhood_2d", grid=(1, 4, 5), text="first", window=3)
        found = result(model, call)
        mask = torch.ones(25, 25, dtype=torch.bool)
        mask[5:, 5:] = compile_attention("neighborhood_2d", height=4, width=5, window=3).mask(20)
        model.set_attn_processor(before)
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", masked(mask))
        near(found, result(model, call))


@pytest.mark.parametrize("model", [wan, hunyuan, ltx], ids=lambda model: model.__name__)
def test_backends_that_any_model_has_set(model: Model) -> None:
    """Theirs are of the process, and resetting those of a model leaves them: a pattern does not ask them."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    own, call = model()
    with torch.no_grad():
        before = bridges.install_diffusers(own, "neighborhood_3d", window=3)
        expected = result(own, call)
        own.set_attn_processor(before)
        try:
            own.set_attention_backend("flex")
            bridges.install_diffusers(own, "neighborhood_3d", window=3)
            near(result(own, call), expected)  # the attention to a text is flex_attention's
            own.set_attention_backend("flex")
            near(result(own, call), expected)  # the attention to a text is flex_attention's
        finally:
            _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    backends = {x.own._attention_backend for x in own.attn_processors.values() if hasattr(x, "own")}
    assert backends == {AttentionBackendName.FLEX}  # as they are given back


def test_processors_that_do_not_ask_torch_are_refused() -> None:
    own, call = wan()
    bridges.install_diffusers(own, "full")

    class Other:
        def __call__(self, attn: Any, hidden_states: Tensor, *rest: Any) -> Tensor:
            return hidden_states

    for processor in own.attn_processors.values():
        if isinstance(processor, bridges.DiffusersProcessor):
            processor.own = Other()
    says = r"Other called .* 0 times, expected one: call the model within diffusers\.attention_backend\(\"native\"\)"
    with torch.no_grad(), pytest.raises(UnsupportedError, match=says):
        result(own, call)
