"""Train a small byte-level transformer at context 4096 on a CPU, its attention compiled from ten lines of `.attn`.

The text is the source of the standard library, which every machine with Python has. The script prints the pattern
and its plan, draws it, trains, and times it against PyTorch: dense attention under the same mask, dense causal
attention, in which a byte sees all bytes before it, and, forward only, FlexAttention, which has no gradient on a CPU.

    python examples/byte_lm.py              about three minutes on two cores
    python examples/byte_lm.py --quick      a few seconds, at context 512
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnc import Attention, compile_attention

PATTERN = Path(__file__).with_name("sliding_window.attn")

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v, each (batch, heads, tokens, head dimension) → the same shape."""


@dataclass(frozen=True)
class Config:
    """Sizes of the model and of the run. `budget`: seconds for everything; a busy machine trains and times less."""

    context: int = 4096
    window: int = 256
    layers: int = 3
    width: int = 128
    heads: int = 4
    steps: int = 200
    budget: float = 140.0
    rounds: int = 7
    learning_rate: float = 4e-3
    seed: int = 0


# --- the model -------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention, then a perceptron, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width, bias=False)
        self.norm_2 = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], attention: AttentionFunction) -> Tensor:
        """x (batch, tokens, width) → the same shape."""
        q, k, v = (self.split_heads(part) for part in self.qkv(self.norm_1(x)).chunk(3, dim=-1))
        out = attention(rotate(q, *rotation), rotate(k, *rotation), v)
        x = x + self.projection(out.transpose(1, 2).flatten(2))
        result: Tensor = x + self.perceptron(self.norm_2(x))
        return result

    def split_heads(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) → (batch, heads, tokens, head dimension)."""
        batch, tokens, width = x.shape
        return x.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2)


class ByteTransformer(nn.Module):
    """A model from bytes to logits of the next byte. The attention is an argument of each call, to be exchanged."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.logits = nn.Linear(config.width, 256)
        nn.init.normal_(self.embedding.weight, std=0.02)
        angles = rotary_angles(config.context, config.width // config.heads)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: Tensor, attention: AttentionFunction) -> Tensor:
        """tokens (batch, tokens) → logits (batch, tokens, 256)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, (self.cos, self.sin), attention)
        logits: Tensor = self.logits(self.norm(x))
        return logits


def rotary_angles(length: int, dim: int) -> Tensor:
    """Return the angle of each position and pair of channels, (length, dim / 2) (RoPE, arXiv 2104.09864)."""
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    return torch.outer(torch.arange(length), frequencies)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of x (…, tokens, dim) by the angles."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


# --- the same attention without attnc --------------------------------------------------------------------------------


def dense(attend: Attention, length: int) -> AttentionFunction:
    """Return the rival without attnc: PyTorch's scaled_dot_product_attention with an additive mask, made once."""
    mask = torch.zeros(length, length).masked_fill_(~attend.mask(length), float("-inf"))
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute PyTorch's dense causal attention: no window, every byte sees all bytes before it."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def flex(config: Config) -> AttentionFunction:
    """Return FlexAttention with the same window, compiled for one shape, forward only: on a CPU it has no gradient.

    Raise RuntimeError if torch cannot compile it, for example without a C++ compiler.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k < config.window)

    block_mask = create_block_mask(seen, None, None, config.context, config.context, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = compiled(q.detach(), k.detach(), v.detach(), block_mask=block_mask)
        return out

    x = torch.zeros(1, config.heads, config.context, config.width // config.heads)
    attend(x, x, x)
    return attend


# --- the text --------------------------------------------------------------------------------------------------------


def standard_library() -> Tensor:
    """Return the source of Python's standard library, its top-level modules in order of name, as bytes."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"\n".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def excerpts(text: Tensor, length: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield random excerpts of the text, endlessly: `length` bytes and the byte that follows each, (1, length)."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        start = int(torch.randint(len(text) - length, (), generator=generator))
        stretch = text[start : start + length + 1].long()
        yield stretch[None, :-1], stretch[None, 1:]


# --- training --------------------------------------------------------------------------------------------------------


class Trainer:
    """A model and its optimiser."""

    def __init__(self, config: Config) -> None:
        torch.manual_seed(config.seed)
        self.model = ByteTransformer(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95))
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, config.learning_rate, total_steps=config.steps + 3 * config.rounds + 4, pct_start=0.15
        )

    def step(self, tokens: Tensor, targets: Tensor, attention: AttentionFunction) -> float:
        """Take a training step; return the loss in nats per byte before the update."""
        loss = F.cross_entropy(self.model(tokens, attention).flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


def train(trainer: Trainer, config: Config, text: Tensor, attention: AttentionFunction, until: float) -> list[float]:
    """Take up to `config.steps` steps, stopping at clock time `until`; return the loss of each."""
    losses: list[float] = []
    bar = Progress("training", config.steps)
    for tokens, targets in excerpts(text, config.context, config.seed):
        losses.append(trainer.step(tokens, targets, attention))
        bar.show(len(losses), f"loss {losses[-1]:.3f}")
        if len(losses) == config.steps or time.perf_counter() > until:
            break
    bar.close()
    return losses


class Progress:
    """A progress bar: rich's if installed, a self-redrawing line on a terminal, else an occasional line."""

    def __init__(self, title: str, total: int) -> None:
        self.title = title
        self.total = total
        self.terminal = sys.stderr.isatty()
        self.bar = rich_bar(title, total) if self.terminal else None

    def show(self, done: int, note: str) -> None:
        """Show that `done` of the total are done."""
        if self.bar is not None:
            self.bar(done, note)
        elif self.terminal:
            filled = 30 * done // self.total
            line = f"\r{self.title} [{'#' * filled}{'.' * (30 - filled)}] {done}/{self.total}  {note}  "
            print(line, end="", file=sys.stderr, flush=True)
        elif done in (1, self.total) or done % max(self.total // 10, 1) == 0:
            print(f"{self.title} {done}/{self.total}  {note}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar on the screen."""
        if self.bar is not None:
            self.bar(-1, "")
        elif self.terminal:
            print(file=sys.stderr)


def rich_bar(title: str, total: int) -> Callable[[int, str], None] | None:
    """Return a function that moves rich's bar (-1 closes it), or None if rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress
    except ImportError:
        return None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    progress = RichProgress(*columns, console=Console(stderr=True))
    task = progress.add_task(title, total=total, note="")
    progress.start()

    def move(done: int, note: str) -> None:
        if done < 0:
            progress.stop()
        else:
            progress.update(task, completed=done, note=note)

    return move


# --- comparing -------------------------------------------------------------------------------------------------------


def compare(runs: Mapping[str, Callable[[], object]], rounds: int, until: float) -> dict[str, list[float]]:
    """Return the seconds of each run, taken in turn after a warm-up round, so that a busy moment affects all of them.

    There are `rounds` rounds, fewer if the clock shows `until`, but at least one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        if number > 1 and time.perf_counter() > until:
            break
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(title: str, seconds: dict[str, list[float]]) -> None:
    """Print median, minimum and maximum of each run, and how much faster the first is than each of the others."""
    print(title)
    for name, times in seconds.items():
        median = statistics.median(times)
        spread = f"{min(times) * 1e3:.1f} to {max(times) * 1e3:.1f}, {len(times)} runs"
        print(f"  {name:<22} {median * 1e3:8.1f} ms   ({spread})")
    (first, ours), *others = seconds.items()
    for name, theirs in others:
        print(f"  {first} against {name}: {ratio_text(ours, theirs)}")


def ratio_text(ours: list[float], theirs: list[float]) -> str:
    """Return how much faster `ours` is: the median of the ratios of successive runs, with minimum and maximum.

    There is no ratio if their spread exceeds the ratio, or for a single run.
    """
    if min(len(ours), len(theirs)) < 2:
        return "no ratio: one run says nothing of the spread"
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    slow = statistics.median(ratios) < 1
    if slow:
        ratios = [1 / ratio for ratio in ratios]
    ratio, low, high = statistics.median(ratios), min(ratios), max(ratios)
    if high - low >= ratio:
        return "no ratio: it differs between runs by more than itself; the machine is busy"
    if low <= 1 <= high:
        return f"no difference beyond the spread ({low:.2f} to {high:.2f})"
    return f"{ratio:.2f} times as {'SLOW' if slow else 'fast'} ({low:.2f} to {high:.2f})"


def attention_alone(config: Config, attention: AttentionFunction) -> Callable[[], None]:
    """Return a run of forward and backward of one layer's attention."""
    shape = (1, config.heads, config.context, config.width // config.heads)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))

    def run() -> None:
        attention(q, k, v).sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    return run


def positive(text: str) -> int:
    """Parse a positive integer of the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


# --- the whole -------------------------------------------------------------------------------------------------------


TRAINING, STEPS, ALONE = 0.55, 0.8, 0.9
"""Shares of the budget at which training, timing of steps and timing of attention alone end."""


def why_it_ended(done: int, config: Config) -> str:
    """Return a sentence on the number of steps."""
    if done == config.steps:
        return f"trained for all {done} steps"
    spent = TRAINING * config.budget
    return (
        f"training stopped at step {done} of {config.steps}: it may take {spent:.0f} s of the {config.budget:.0f} s "
        f"for everything, and this machine is slower or busy; --budget {2 * config.budget:.0f} gives it twice the time"
    )


def forward_alone(config: Config, attention: AttentionFunction) -> Callable[[], None]:
    """Return a run of the forward of one layer's attention."""
    shape = (1, config.heads, config.context, config.width // config.heads)
    q, k, v = (torch.randn(shape) for _ in range(3))

    def run() -> None:
        with torch.no_grad():
            attention(q, k, v)

    return run


def forward_rivals(
    config: Config, rivals: Mapping[str, AttentionFunction], *, quick: bool
) -> dict[str, AttentionFunction]:
    """Return the rivals of a forward, with compiled FlexAttention if torch can compile it; else a line says why not."""
    if quick:
        print("compiled FlexAttention: left out of --quick, as compiling it takes longer than all the rest")
        return dict(rivals)
    try:
        return {**rivals, "compiled FlexAttention": flex(config)}
    except RuntimeError as error:
        print(f"compiled FlexAttention: torch does not compile it here: {str(error).splitlines()[0]}")
        return dict(rivals)


def show_pattern(attend: Attention, config: Config, picture: Path) -> None:
    """Print the pattern's text and its plan, and write its picture."""
    print(f"{PATTERN.name}\n\n{PATTERN.read_text(encoding='utf-8')}")
    print(attend.plan(config.context, heads=config.heads, head_dim=config.width // config.heads))
    picture.write_text(attend.picture(config.context), encoding="utf-8")
    print(f"\npicture written to {picture.resolve()}\n")


def run(config: Config, picture: Path, *, quick: bool) -> bool:
    """Run everything; return whether the loss fell."""
    begun = time.perf_counter()
    attend = compile_attention(PATTERN, window=config.window)
    show_pattern(attend, config, picture)

    text = standard_library()
    trainer = Trainer(config)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(
        f"text: {len(text) / 1e6:.1f} MB of Python's standard library; model: {config.layers} layers, width "
        f"{config.width}, {parameters / 1e6:.2f} M parameters; context {config.context} bytes, window {config.window}"
    )
    losses = train(trainer, config, text, attend, begun + TRAINING * config.budget)
    print(why_it_ended(len(losses), config))
    few = max(len(losses) // 10, 1)
    first, last = statistics.mean(losses[:few]), statistics.mean(losses[-few:])
    print(
        f"loss, nats per byte: {first:.3f} over the first {few} steps, {last:.3f} over the last {few} of {len(losses)}"
    )
    print()

    masked = dense(attend, config.context)
    tokens, targets = next(excerpts(text, config.context, config.seed + 1))
    rivals: dict[str, AttentionFunction] = {"attnc": attend, "SDPA with the mask": masked, "causal SDPA": causal}
    step = {name: partial(trainer.step, tokens, targets, one) for name, one in rivals.items()}
    report(
        "one training step (forward, backward, update), the same model:",
        compare(step, config.rounds, begun + STEPS * config.budget),
    )
    alone = {name: attention_alone(config, one) for name, one in rivals.items()}
    title = "attention alone (one layer, forward and backward):"
    report(title, compare(alone, config.rounds, begun + ALONE * config.budget))
    forward = forward_rivals(config, rivals, quick=quick)
    runs = {name: forward_alone(config, one) for name, one in forward.items()}
    title = "attention alone (one layer, forward):"
    report(title, compare(runs, config.rounds, max(begun + config.budget, time.perf_counter() + 2)))
    print("causal SDPA has no window: every byte sees all bytes before it, which is another model")
    print(f"on {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, fp32")
    return last < first


def main(arguments: Iterable[str] | None = None) -> int:
    """Run the demonstration; return 0 if the loss fell, else 1."""
    standard = Config()
    parser = argparse.ArgumentParser(description="Train a byte-level transformer with a sliding window.")
    parser.add_argument("--steps", type=positive, help=f"training steps ({standard.steps})")
    parser.add_argument("--budget", type=float, default=standard.budget, help="seconds for everything (%(default)s)")
    parser.add_argument("--window", type=positive, default=standard.window, help="keys that a query sees (%(default)s)")
    parser.add_argument("--picture", type=Path, default=Path("byte_lm.svg"), help="where to draw (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a small model at context 512, for a first look")
    options = parser.parse_args(None if arguments is None else list(arguments))

    config = replace(standard, budget=options.budget, window=options.window)
    if options.quick:
        small = replace(config, context=512, layers=1, width=64, heads=2, steps=12, rounds=2)
        config = replace(small, window=min(options.window, 64))
    if options.steps is not None:
        config = replace(config, steps=options.steps)
    begun = time.perf_counter()
    fell = run(config, options.picture, quick=options.quick)
    print(f"{time.perf_counter() - begun:.0f} s in all")
    if not fell:
        print("error: the loss did not fall; something is broken", file=sys.stderr)
    return 0 if fell else 1


if __name__ == "__main__":
    sys.exit(main())
