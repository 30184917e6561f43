"""Small random models of Transformers and Diffusers, built from configurations without downloads."""

from __future__ import annotations

from typing import Any

import torch

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
NO_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def _built(kind: Any, config: Any, implementation: str) -> Any:
    torch.manual_seed(0)
    config._attn_implementation = implementation
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # large enough that attention affects the output
                parameter.normal_(0, 0.2)
    return model


def llama(implementation: str, **options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, **NO_TOKENS, num_hidden_layers=2, **options)
    return _built(LlamaForCausalLM, config, implementation)


def mistral(implementation: str) -> Any:
    """Build a Mistral with a window of 7 in all layers."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**SIZES, **NO_TOKENS, num_hidden_layers=2, sliding_window=7)
    return _built(MistralForCausalLM, config, implementation)


def gemma2(implementation: str) -> Any:
    """Build a Gemma 2: window of 7 in layers 0 and 2, all keys in layers 1 and 3; a soft cap, and its own scale."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        **SIZES,
        **NO_TOKENS,
        num_hidden_layers=4,
        head_dim=16,
        sliding_window=7,
        query_pre_attn_scalar=5,
        attn_logit_softcapping=1.5,
    )
    return _built(Gemma2ForCausalLM, config, implementation)


def gemma3(implementation: str) -> Any:
    """Build a Gemma 3: window of 6 in layer 0, all keys in layer 1, normalised queries and keys."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **SIZES,
        **NO_TOKENS,
        num_hidden_layers=2,
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    )
    return _built(Gemma3ForCausalLM, config, implementation)


def llama4(implementation: str) -> Any:
    """Build a Llama 4: chunks of 6 in layer 0, all keys in layer 1."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        **SIZES,
        **NO_TOKENS,
        num_hidden_layers=2,
        head_dim=8,
        attention_chunk_size=6,
        layer_types=["chunked_attention", "full_attention"],
        num_local_experts=2,
        intermediate_size_mlp=32,
        moe_layers=[],
    )
    return _built(Llama4ForCausalLM, config, implementation)


def gpt_oss(implementation: str) -> Any:
    """Build a gpt-oss: window of 7 in layer 0, all keys in layer 1, sinks in both."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **SIZES,
        **NO_TOKENS,
        num_hidden_layers=2,
        head_dim=8,
        sliding_window=7,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = _built(GptOssForCausalLM, config, implementation)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


def bert(implementation: str) -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, pad_token_id=0
    )
    return _built(BertModel, config, implementation)


def modernbert(implementation: str) -> Any:
    """Build a ModernBERT: three tokens to either side in layers 1 and 2, all in layer 0."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    config = ModernBertConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=32,
        local_attention=6,
        global_attn_every_n_layers=3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    return _built(ModernBertForMaskedLM, config, implementation)


# --- video transformers: a model, and the arguments of a call on 3 x 4 x 6 tokens -----------------------------------

GRID = (3, 4, 6)


def _video(kind: Any, **config: Any) -> Any:
    torch.manual_seed(0)
    model = kind(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    return model


def wan() -> tuple[Any, dict[str, Any]]:
    """Build a Wan: video tokens only; the text enters by cross-attention."""
    from diffusers import WanTransformer3DModel

    model = _video(
        WanTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )
    call = {
        "hidden_states": torch.randn(2, 4, 3, 8, 12),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 5, 16),
    }
    return model, call


def hunyuan() -> tuple[Any, dict[str, Any]]:
    """Build a HunyuanVideo: the text after the video, in one block of either kind; entry 1 has 4 of 7 text tokens."""
    from diffusers import HunyuanVideoTransformer3DModel

    model = _video(
        HunyuanVideoTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 4, 4),
    )
    call = {
        "hidden_states": torch.randn(2, 4, 3, 8, 12),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "encoder_attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
        "pooled_projections": torch.randn(2, 8),
        "guidance": torch.tensor([1000.0, 1000.0]),
    }
    return model, call


def cogvideox() -> tuple[Any, dict[str, Any]]:
    """Build a CogVideoX: the text before the video."""
    from diffusers import CogVideoXTransformer3DModel

    model = _video(
        CogVideoXTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=12,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=5,
    )
    call = {
        "hidden_states": torch.randn(2, 3, 4, 8, 12),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "timestep": torch.tensor([3, 7]),
    }
    return model, call


def ltx() -> tuple[Any, dict[str, Any]]:
    """Build an LTX: video only, passed as tokens."""
    from diffusers import LTXVideoTransformer3DModel

    model = _video(
        LTXVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=16,
    )
    call = {
        "hidden_states": torch.randn(2, 72, 4),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "timestep": torch.tensor([3, 7]),
        "encoder_attention_mask": torch.ones(2, 5),
        "num_frames": 3,
        "height": 4,
        "width": 6,
    }
    return model, call
