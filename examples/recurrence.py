"""Associative recall with a recurrence that is written here: pairs of a key and a value, then keys without values.

The gated delta rule corrects the value that the state holds for a key, so that a read returns the key's last value. It
is trained in chunks, and then runs token by token from its state, with the same answers.

    python examples/recurrence.py
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional

from attnc import compile_attention

SPEC = '''
recurrence recall
    """Forget, then correct."""
    input g: log_decay[batch, token, head]
    input beta: unit[batch, token, head]
    state S: [dk, dv]
    step  S = exp(g) * S
    step  S = S + beta * outer(k, v - k @ S)
    read  q @ S
'''
KEYS, VALUES, PAIRS, ASKED = 24, 16, 60, 30
WIDTH, STEPS = 32, 150

attend = compile_attention(SPEC)
States = dict[str, Tensor]


class Recall(nn.Module):
    """One layer; token t is a key, with its value or 0."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Embedding(KEYS, WIDTH), nn.Embedding(VALUES + 1, WIDTH)
        self.gates = nn.Linear(WIDTH, 2)
        self.out = nn.Linear(WIDTH, VALUES)

    def forward(self, keys: Tensor, values: Tensor, state: States | None = None) -> tuple[Tensor, States]:
        """Return logits (B, T, VALUES) and the states after the last token, from keys and values (B, T)."""
        k = functional.normalize(self.key(keys), dim=-1)[:, None]
        v = self.value(values)
        decay, write = self.gates(v).unsqueeze(-2).unbind(-1)
        g, beta = functional.logsigmoid(decay + 4), write.sigmoid()
        out, state = attend(k, k, v[:, None], g=g, beta=beta, state=state, return_state=True)
        return self.out(out[:, 0]), state


def draw(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw sequences (keys, values, targets): pairs, then keys whose last value is the target; else -100."""
    keys, values = torch.randint(KEYS, (count, PAIRS)), torch.randint(1, VALUES + 1, (count, PAIRS))
    last = torch.zeros(count, KEYS, dtype=torch.long)
    for t in range(PAIRS):
        last.scatter_(1, keys[:, t : t + 1], values[:, t : t + 1])
    wanted_keys = torch.randint(KEYS, (count, ASKED))
    wanted = last.gather(1, wanted_keys) - 1
    wanted[wanted < 0] = -100
    nothing = torch.full((count, PAIRS), -100)
    return torch.cat([keys, wanted_keys], 1), functional.pad(values, (0, ASKED)), torch.cat([nothing, wanted], 1)


def main() -> int:
    """Train, then answer token by token; return 0 if it learned and the steps agree."""
    torch.manual_seed(0)
    print(attend.derivation())
    model = Recall()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS + 1):
        keys, values, wanted = draw(32)
        logits, _ = model(keys, values)
        loss = functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100)
        if step % 50 == 0:
            print(f"step {step:3}: loss {loss.item():.3f}")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        keys, values, wanted = draw(16)
        whole, _ = model(keys, values)
        _, state = model(keys[:, :PAIRS], values[:, :PAIRS])
        answers = []
        for t in range(PAIRS, PAIRS + ASKED):
            logits, state = model(keys[:, t : t + 1], values[:, t : t + 1], state)
            answers.append(logits)
        apart = (torch.cat(answers, 1) - whole[:, PAIRS:]).abs().max().item()
        right = (whole.argmax(-1) == wanted)[wanted >= 0].float().mean().item()
    print(f"{right:.0%} of the answers are right; token by token they differ by {apart:.1e}")
    return 0 if right > 0.9 and apart < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
