"""A pattern in existing models: a Llama that trains and generates with a window, a Wan that sees its neighbours.

Both models are small and random, built from configurations; nothing is downloaded. Needs `pip install '.[interop]'`.

    python examples/hugging_face.py
"""

from __future__ import annotations

import sys
from typing import Any

import torch

import attnc


def llama(implementation: str) -> Any:
    """Return a Llama model with the same weights every time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        attn_implementation=implementation,
    )
    return LlamaForCausalLM(config)


def language_model() -> bool:
    """Train and generate; return whether the loss fell and a padded batch continues each prompt as alone."""
    name = attnc.bridges.register_transformers("sliding_window", window=16, sinks=2)
    model = llama(name)
    ids = torch.arange(96)[None] * 5 % 251 + 2
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model(ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    print(f"Llama with attn_implementation={name!r}: loss {losses[0]:.2f} → {losses[-1]:.2f} in {len(losses)} steps")

    model.eval()
    prompts = torch.cat([ids[:, :40], torch.nn.functional.pad(ids[:, 10:35], (15, 0))])
    mask = torch.ones_like(prompts)
    mask[1, :15] = 0
    told: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
    together = model.generate(prompts, attention_mask=mask, **told)[:, -20:]
    each = ids[:, :40], ids[:, 10:35]
    alone = [model.generate(p, attention_mask=torch.ones_like(p), **told)[0, -20:] for p in each]
    agrees = torch.equal(together, torch.stack(alone))
    print(f"20 tokens after prompts of 40 and 25 in one batch: {'as each alone' if agrees else 'NOT as each alone'}")

    try:
        llama(attnc.bridges.register_transformers("full"))(ids)
    except attnc.ArgumentError as error:
        print(f"refused: {error}")
    return losses[-1] < losses[0] / 2 and agrees


def video_model() -> bool:
    """Return whether `full` equals the model's own attention, and neighbourhoods differ from it."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    sizes = {"attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "text_dim": 16, "ffn_dim": 64}
    model = WanTransformer3DModel(num_attention_heads=2, num_layers=2, **sizes)
    call = {
        "hidden_states": torch.randn(1, 4, 4, 12, 16),  # patches of 1 × 2 × 2: a grid of 4 × 6 × 8 tokens
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 5, 16),
    }
    with torch.no_grad():
        own_output = model(**call).sample
        before = attnc.bridges.install_diffusers(model, "full")
        same = (model(**call).sample - own_output).abs().max().item()
        attnc.bridges.install_diffusers(model, "neighborhood_3d", window=3)
        near = (model(**call).sample - own_output).abs().max().item()
        model.set_attn_processor(before)
    print(f"Wan with `full`: largest difference from its own attention {same:.1e}")
    print(f"Wan with `neighborhood_3d`, 27 neighbours of 192 tokens: {near:.1e}")
    return bool(same < 1e-4 < near)


def main() -> int:
    """Run both models; return 0 if their checks hold."""
    return 0 if language_model() and video_model() else 1


if __name__ == "__main__":
    sys.exit(main())
