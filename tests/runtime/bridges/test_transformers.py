"""Transformers models under attnc give the same result as under their own attention and under an explicit mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import ArgumentError, ArgumentTypeError, PatternNotFoundError, SpecError, UnsupportedError, bridges
from attnc import compile_attention as compiled
from tiny_models import bert, gemma2, gemma3, gpt_oss, llama, llama4, mistral, modernbert

pytest.importorskip("transformers", reason="Transformers is not installed: pip install 'attnc[interop]'")

Model = Callable[[str], Any]
DECODERS: list[Model] = [llama, mistral, gemma2, gemma3, gpt_oss, llama4]
ENCODERS: list[Model] = [bert, modernbert]
LENGTH = 23


@pytest.fixture(autouse=True)
def _names_of_this_test(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    from attnc.runtime.bridges import transformers

    monkeypatch.setattr(transformers, "_REGISTERED", {})
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))


def tokens(batch: int = 3, length: int = LENGTH) -> Tensor:
    return torch.randint(2, 61, (batch, length), generator=torch.Generator().manual_seed(1))


def padding(side: str) -> Tensor:
    """Return the padding mask of batch entries with 23, 17 and 12 tokens."""
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, :6], mask[2, :11] = 0, 0
    return mask if side == "left" else mask.flip(1)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


def result(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        out = model(ids, **options)
    output: Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return output


def additive_mask(visible: Tensor) -> Tensor:
    """Return a mask (N, N) as the additive tensor that a model accepts in place of its own mask."""
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]


def positions(n: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n)[:, None], torch.arange(n)[None]


# --- agreement with the model's own mask -----------------------------------------------------------------------------


@pytest.mark.parametrize("model", [*DECODERS, *ENCODERS], ids=lambda model: model.__name__)
def test_the_models_own_masks(model: Model) -> None:
    """Causal masks, both kinds of sliding windows and chunks; scales, caps and sinks; padding on either side."""
    eager, attnc_model = model("eager"), model(bridges.register_transformers())
    ids = tokens()
    assert_near(result(attnc_model, ids), result(eager, ids))
    for side in ("left", "right"):
        mask = padding(side)
        output, expected = (result(m, ids, attention_mask=mask)[mask.bool()] for m in (attnc_model, eager))
        assert_near(output, expected)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("model", DECODERS, ids=lambda model: model.__name__)
def test_generation(model: Model, cache: str | None) -> None:
    """A batch of prompts of different lengths, generated past the end of every window and chunk."""
    options: dict[str, Any] = {"cache_implementation": cache} if cache else {}
    runs = [
        m.generate(
            tokens(),
            attention_mask=padding("left"),
            max_new_tokens=14,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        for m in (model("eager"), model(bridges.register_transformers()))
    ]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    for expected, output in zip(runs[0].logits, runs[1].logits, strict=True):
        assert_near(output, expected)


def test_beam_search() -> None:
    runs = [
        m.generate(tokens(), attention_mask=padding("left"), max_new_tokens=9, num_beams=3, do_sample=False)
        for m in (gemma2("eager"), gemma2(bridges.register_transformers()))
    ]
    assert torch.equal(*runs)


@pytest.mark.parametrize("model", DECODERS, ids=lambda model: model.__name__)
def test_several_tokens_after_a_cache(model: Model) -> None:
    attnc_model, ids = model(bridges.register_transformers()), tokens()
    full_output = result(attnc_model, ids)
    with torch.no_grad():
        first = attnc_model(ids[:, :15], use_cache=True)
        rest = attnc_model(ids[:, 15:], past_key_values=first.past_key_values)
    assert_near(torch.cat([first.logits, rest.logits], 1), full_output)


@pytest.mark.parametrize("model", [llama, gemma2], ids=lambda model: model.__name__)
def test_packed_sequences(model: Model) -> None:
    """Position ids that restart at 0 mark packed sequences, which do not see each other."""
    ids = tokens()
    places = torch.cat([torch.arange(9), torch.arange(LENGTH - 9)])[None].expand(3, -1)
    eager, attnc_model = model("eager"), model(bridges.register_transformers())
    output = result(attnc_model, ids, position_ids=places, use_cache=False)
    assert_near(output, result(eager, ids, position_ids=places, use_cache=False))
    assert_near(output[:, 9:], result(attnc_model, ids[:, 9:]))


@pytest.mark.parametrize("model", [llama, gemma2], ids=lambda model: model.__name__)
def test_packed_sequences_beside_a_mask_of_ones_and_a_cache(model: Model) -> None:
    """Transformers drops packing beside a mask or a cache, and passes both by default; the bridge must keep packing."""
    ids, ones = tokens(), torch.ones(3, LENGTH, dtype=torch.long)
    places = torch.cat([torch.arange(9), torch.arange(LENGTH - 9)])[None]
    attnc_model = model(bridges.register_transformers())
    expected = result(model("eager"), ids, position_ids=places, use_cache=False)
    assert_near(result(attnc_model, ids, position_ids=places, attention_mask=ones, use_cache=False), expected)
    assert_near(result(attnc_model, ids, position_ids=places), expected)


def test_packed_sequences_and_padding_are_refused_together() -> None:
    attnc_model, ids, mask = llama(bridges.register_transformers()), tokens(), padding("right")
    places = torch.arange(LENGTH)[None].repeat(3, 1)
    places[1, 17:] = 0  # padding tokens may have any position
    assert result(attnc_model, ids, position_ids=places, attention_mask=mask).isfinite().all()
    places[1, 5:17] = torch.arange(12)
    with pytest.raises(ArgumentError, match=r"batch entry 1 has both padding .* and packed sequences"):
        result(attnc_model, ids, position_ids=places, attention_mask=mask)


def test_packed_sequences_after_a_cache_are_refused() -> None:
    attnc_model, ids = llama(bridges.register_transformers()), tokens()
    with torch.no_grad():
        first = attnc_model(ids[:, :15], use_cache=True)
        places = torch.tensor([[15, 16, 17, 0, 1, 2, 3, 4]])
        with pytest.raises(UnsupportedError, match="restart with a cache of 15 tokens"):
            attnc_model(ids[:, 15:], past_key_values=first.past_key_values, position_ids=places)


def test_cumulative_lengths_of_a_flattening_collator() -> None:
    from transformers import DataCollatorWithFlattening

    rows = [{"input_ids": row[:n].tolist()} for row, n in zip(tokens(), (9, 5, 9), strict=True)]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)
    attnc_model = llama(bridges.register_transformers())
    output = result(attnc_model, **{"ids": batch.pop("input_ids")}, **batch)
    alone = [result(attnc_model, torch.tensor([row["input_ids"]])) for row in rows]
    assert_near(output, torch.cat(alone, 1))
    flat = torch.cat([torch.tensor(row["input_ids"]) for row in rows])[None]
    lengths = torch.tensor([0, 9, 14, LENGTH])
    # only the lengths give the borders between sequences
    borders = {"position_ids": torch.arange(LENGTH)[None], "cu_seq_lens_q": lengths}
    last = result(attnc_model, flat, **borders)[:, 14:]
    assert_near(last, result(attnc_model, flat[:, 14:], position_ids=torch.arange(14, LENGTH)[None]))
    with pytest.raises(ArgumentError, match="restart at token 14, where `cu_seq_lens_q` has no border"):
        result(attnc_model, flat, position_ids=batch["position_ids"], cu_seq_lens_q=torch.tensor([0, 9, LENGTH]))


@pytest.mark.parametrize("model", [llama, gemma2, gpt_oss], ids=lambda model: model.__name__)
def test_gradients(model: Model) -> None:
    eager, attnc_model = model("eager").train(), model(bridges.register_transformers()).train()
    ids, mask = tokens(), padding("left")
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 6], labels[2, 11] = -100, -100  # otherwise first tokens could not be told from padding
    for m in (eager, attnc_model):
        m(ids, attention_mask=mask, labels=labels).loss.backward()
    for (name, output), expected in zip(attnc_model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(output.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=f"{name} differs")


def test_checkpointed_training_learns() -> None:
    model = llama(bridges.register_transformers("sliding_window", window=8)).train()
    model.activation_checkpointing_enable()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.003)
    ids, losses = tokens(), []
    for _ in range(12):
        optimiser.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


# --- patterns in a model ---------------------------------------------------------------------------------------------


def test_a_pattern_is_an_eager_run_with_its_mask() -> None:
    q, k = positions(LENGTH)
    cases = {
        bridges.register_transformers("sliding_window", window=5, sinks=2): (k <= q) & ((q - k < 5) | (k < 2)),
        bridges.register_transformers("strided", stride=4, local=3): (k <= q) & ((q - k < 3) | ((q - k) % 4 == 0)),
        bridges.register_transformers("pattern odd\n    visible k <= q and (k % 2 == 1 or q == k)\n"): (k <= q)
        & ((k % 2 == 1) | (q == k)),
    }
    ids, eager = tokens(), llama("eager")
    for name, visible in cases.items():
        expected = result(eager, ids, attention_mask=additive_mask(visible))
        assert_near(result(llama(name), ids), expected)


def test_generation_by_a_pattern_is_without_padding_and_without_a_cache() -> None:
    """Positions count from each prompt's own start: the sinks are its own first tokens."""
    model = llama(bridges.register_transformers("sliding_window", window=4, sinks=2))
    mask = padding("left")
    for cache in ({}, {"cache_implementation": "static"}):
        output = model.generate(tokens(), attention_mask=mask, max_new_tokens=6, do_sample=False, **cache)
        for entry in range(3):
            alone = tokens()[entry][mask[entry].bool()][None]
            for _ in range(6):
                alone = torch.cat([alone, result(model, alone)[:, -1:].argmax(-1)], 1)
            assert torch.equal(output[entry, -6:], alone[0, -6:])


def test_sliding_window_as_transformers_counts_it() -> None:
    """Transformers' window of w includes the query's own key, as ours does; a longer window is not contained in it."""
    ids = tokens()
    within = mistral(bridges.register_transformers("sliding_window", window=7))
    assert_near(result(within, ids), result(mistral("eager"), ids))
    over = mistral(bridges.register_transformers("sliding_window", window=8, name="attnc:over"))
    with pytest.raises(ArgumentError, match=r"layer 0 is causal, sliding_window 7, .*query 7 sees key 0"):
        over(ids)


def test_a_pattern_in_some_layers() -> None:
    """Some layers use a pattern, the other layers their own mask."""
    q, k = positions(LENGTH)
    ids = tokens()
    spec = compiled("sliding_window", window=9, sinks=1)
    by_kind = bridges.register_transformers(spec, layers=["full_attention"])
    by_number = bridges.register_transformers(spec, layers=[1, 3], name="attnc:by-number")
    with pytest.raises(ArgumentError, match="layer 0"):
        gemma2(bridges.register_transformers(spec, name="attnc:everywhere"))(ids)
    expected = gemma2("eager")
    masks = {
        "sliding_attention": additive_mask((k <= q) & (q - k < 7)),
        "full_attention": additive_mask((k <= q) & ((q - k < 9) | (k < 1))),
    }
    wanted = result(expected, ids, attention_mask=masks)
    for name in (by_kind, by_number):
        assert_near(result(gemma2(name), ids), wanted)


def test_override() -> None:
    ids = tokens()
    name = bridges.register_transformers("full", override=True)
    output = result(llama(name), ids)
    assert_near(output, result(llama("eager"), ids, attention_mask=torch.zeros(1, 1, 1, 1)))


def test_inputs_of_the_pattern() -> None:
    """The pattern's inputs are keyword arguments of the model's call, and are cut like its batch under padding."""
    name = bridges.register_transformers("document")
    ids, mask = tokens(), padding("left")
    doc = (torch.arange(LENGTH) // 8)[None].expand(3, -1)
    q, k = positions(LENGTH)
    seen = (k <= q) & (doc[0][:, None] == doc[0])
    expected = result(llama("eager"), ids, attention_mask=additive_mask(seen))
    assert_near(result(llama(name), ids, doc=doc), expected)
    output = result(llama(name), ids, doc=doc, attention_mask=mask)
    places = additive_mask(seen & mask[1].bool())
    expected = result(llama("eager"), ids[1:2], attention_mask=places, position_ids=torch.arange(LENGTH)[None])
    assert_near(output[1, 6:], expected[0, 6:])
    with pytest.raises(ArgumentTypeError, match=r"needs the input `doc`.*model\(…, doc=…\)"):
        llama(name)(ids)


def test_selections_are_contained_in_their_conditions() -> None:
    """A selection is taken to select every candidate: `k <= q` beside it is enough to prove containment."""
    name = bridges.register_transformers("moba", block=4, topk=2)
    assert result(llama(name), tokens()).isfinite().all()


def test_bidirectional_models_take_grids() -> None:
    name = bridges.register_transformers("neighborhood_2d", height=4, width=5, window=3)
    ids = tokens(2, 20)
    positions = torch.arange(20)
    rows, columns = positions // 5, positions % 5

    def around(place: Tensor, extent: int) -> Tensor:
        first = (place - 1).clamp(0, extent - 3)
        return (place[None] >= first[:, None]) & (place[None] < first[:, None] + 3)

    expected = result(bert("eager"), ids, attention_mask=additive_mask(around(rows, 4) & around(columns, 5)))
    assert_near(result(bert(name), ids), expected)
    with pytest.raises(ArgumentError, match="k has 23 tokens"):
        bert(name)(tokens())


# --- errors ----------------------------------------------------------------------------------------------------------


def test_registration_refuses_wrong_arguments() -> None:
    register = bridges.register_transformers
    with pytest.raises(PatternNotFoundError, match="did you mean `sliding_window`"):
        register("sliding_windw")
    with pytest.raises(SpecError, match="did you mean `window`"):
        register("sliding_window", windw=3)
    with pytest.raises(ArgumentTypeError, match="`window` cannot be set for `causal`, which is compiled"):
        register(compiled("causal"), window=3)
    with pytest.raises(ArgumentTypeError, match="`window` cannot be set for each layer's own mask"):
        register(window=3)
    with pytest.raises(UnsupportedError, match="`gla` has a state"):
        register("gla")
    with pytest.raises(ArgumentError, match='must start with "attnc:"'):
        register("causal", name="causal")
    with pytest.raises(ArgumentError, match="takes a name with `flash` for its own"):
        register("pattern flash_window\n    visible 0 <= q - k < 4\n")
    with pytest.raises(ArgumentTypeError, match=r"pass a list, layers=\['full_attention'\]"):
        register("causal", layers="full_attention")
    with pytest.raises(ArgumentError, match="no kind `full_atention`: did you mean `full_attention`"):
        register("causal", layers=["full_atention"])


def test_a_registered_name_stands_for_one_pattern() -> None:
    register = bridges.register_transformers
    assert register("sliding_window", window=5) == register("sliding_window", window=5) == "attnc:sliding_window"
    with pytest.raises(ArgumentError, match=r"registered already, as Attention\('sliding_window', window=5, sinks=0\)"):
        register("sliding_window", window=6)
    assert register("sliding_window", window=6, replace=True) == "attnc:sliding_window"


def test_patterns_that_contradict_the_model() -> None:
    ids = tokens()
    future = llama(bridges.register_transformers("full"))
    with pytest.raises(ArgumentError, match=r"in layer 0 is causal, and `full` shows more: .*query 0 sees key 1\."):
        future(ids)
    prefix = llama(bridges.register_transformers("prefix_lm"))
    with pytest.raises(ArgumentError, match="`prefix_lm` may show more"):
        prefix(ids, prefix=torch.tensor([3, 3, 3]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_mask": torch.zeros(3, 1, LENGTH, LENGTH)}, "defines visibility pair by pair"),
        ({"output_attentions": True}, "output_attentions"),
        ({"cu_seq_lens_q": torch.tensor([0, 9, LENGTH])}, "`cu_seq_lens_q` with 3 batch entries"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
    ],
)
def test_calls_are_refused(options: dict[str, Any], message: str) -> None:
    model = llama(bridges.register_transformers("sliding_window", window=5))
    with pytest.raises(UnsupportedError, match=message):
        model(tokens(), **options)


def test_dropout_is_refused_while_training() -> None:
    model = llama(bridges.register_transformers(), attention_dropout=0.1)
    assert result(model, tokens()).isfinite().all()
    with pytest.raises(UnsupportedError, match="set `attention_dropout` to 0"):
        model.train()(tokens())
    with pytest.raises(UnsupportedError, match="set `attention_probs_dropout_prob` to 0"):
        bert(bridges.register_transformers()).train()(tokens())


def test_padding_between_tokens_is_refused() -> None:
    model = llama(bridges.register_transformers())
    mask = padding("left")
    mask[0, 7] = 0
    with pytest.raises(ArgumentError, match="zeros between the ones of batch entry 0"):
        model(tokens(), attention_mask=mask)
    with pytest.raises(ArgumentError, match="has 20 columns, expected 23"):
        model(tokens(), attention_mask=mask[:, :20])


def test_conflicting_scores_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"caps its scores at 1\.5, and `softcap` has scores"):
        gemma2(bridges.register_transformers("softcap", cap=2, window=5))(tokens())
    with pytest.raises(UnsupportedError, match=r"has sinks \(s_aux\), and `gpt_oss` has scores"):
        gpt_oss(bridges.register_transformers("gpt_oss", window=5))(tokens())


def test_a_cache_that_has_dropped_needed_keys_is_refused() -> None:
    """A model's sliding cache does not keep sinks, which an overriding pattern reads."""
    model = mistral(bridges.register_transformers("sliding_window", window=3, sinks=2, override=True))
    with pytest.raises(ArgumentError, match=r"may need the first 2 and the last 3 tokens of .* keeps the last 7"):
        model.generate(tokens(), max_new_tokens=2)
    model = mistral(bridges.register_transformers("sliding_window", window=9, override=True, name="attnc:nine"))
    with pytest.raises(ArgumentError, match=r"may need the last 9 tokens of 24, .* keeps the last 7"):
        model.generate(tokens(), max_new_tokens=2)


def test_masks_made_by_other_functions_are_refused() -> None:
    from transformers.masking_utils import create_causal_mask

    model = llama(bridges.register_transformers())
    arguments = {"config": model.config, "inputs_embeds": torch.zeros(1, 4, 32), "attention_mask": None}
    with pytest.raises(UnsupportedError, match="the model's own mask is made by `or_masks`"):
        create_causal_mask(**arguments, past_key_values=None, or_mask_function=lambda b, h, q, k: q == k)


@pytest.mark.slow
def test_torch_compile_runs_between_graphs() -> None:
    model, ids = gemma2(bridges.register_transformers()), tokens()
    fast = torch.compile(model, backend="eager", dynamic=True)
    for length in (LENGTH, 12):
        assert_near(result(fast, ids[:, :length]), result(model, ids[:, :length]))
