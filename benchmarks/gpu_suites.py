"""The parts for a GPU, in order of value: correctness first, then speed. Each takes less than nine minutes."""

from __future__ import annotations

from benchmark_part import Part

CORRECT = (
    Part("gpu-correct-masks", "correct", "masks and scores against fp64, with gradients", "gpu_check:correct", 6),
    Part("gpu-correct-recurrences", "correct", "recurrences against the token loop", "gpu_recurrence:correct", 6),
    Part("gpu-correct-routing", "correct", "selected blocks against fp64, with gradients", "gpu_routing:correct", 6),
    Part("gpu-correct-decode", "correct", "steps from slots and pages, replayed", "gpu_decode:correct", 3),
    Part("gpu-repeat", "correct", "twenty repeats, the same bits", "gpu_check:repeat", 4),
    Part("gpu-edges", "correct", "65,538 lanes, offsets past 2^31", "gpu_check:edges", 2),
    Part("gpu-graphs", "correct", "forward and backward in CUDA graphs", "gpu_check:graph", 3),
    Part("gpu-torch-compile", "correct", "torch.compile(fullgraph=True), the same bits", "gpu_check:compiled", 5),
    Part("gpu-steps", "routing", "training steps with new selections, without waits", "gpu_routing:steps", 5),
)
FLEX = (
    Part("gpu-windows-text", "windows", "causal windows, powers, documents, forward", "gpu_masks:windows_text", 8),
    Part("gpu-backward-text", "backward", "their gradients", "gpu_masks:windows_backward_text", 8.5),
    Part("gpu-windows-video", "windows", "NATTEN's windows, stride 1, forward", "gpu_masks:windows_video", 6),
    Part("gpu-backward-video", "backward", "their gradients", "gpu_masks:windows_backward_video", 7),
    Part("gpu-blocks-video", "block_sparse", "NATTEN's strided windows, STA", "gpu_masks:blocks_video", 7),
    Part("gpu-backward-blocks-video", "backward", "their gradients", "gpu_masks:blocks_backward_video", 8.5),
    Part("gpu-blocks-other", "block_sparse", "S2, random blocks, radial, forward", "gpu_masks:blocks_other", 7),
    Part("gpu-backward-blocks-other", "backward", "their gradients", "gpu_masks:blocks_backward_other", 8),
    Part("gpu-dense-128", "dense", "full and causal, heads of 128, forward", "gpu_masks:dense_128", 6),
    Part("gpu-dense-64", "dense", "the same, heads of 64", "gpu_masks:dense_64", 6),
    Part("gpu-dense-256", "dense", "the same, heads of 256", "gpu_masks:dense_256", 6),
    Part("gpu-backward-dense", "backward", "their gradients", "gpu_masks:dense_backward", 7),
    Part("gpu-deterministic", "backward", "the cost of deterministic gradients", "gpu_masks:deterministic", 3),
)
RECURRENCE = (
    Part("gpu-recurrence-gates", "recurrence", "retention and GLA against fla", "gpu_recurrence:forward_gates", 6),
    Part("gpu-recurrence-delta", "recurrence", "delta rules against fla", "gpu_recurrence:forward_delta", 7),
    Part("gpu-training-gates", "recurrence", "with backward", "gpu_recurrence:training_gates", 8),
    Part("gpu-training-delta", "recurrence", "with backward", "gpu_recurrence:training_delta", 8.5),
    Part("gpu-recurrence-authors", "recurrence", "against Lightning-2 and Mamba-2", "gpu_recurrence:authors", 5),
    Part("gpu-recurrence-lengths", "recurrence", "8,192 to 131,072 tokens", "gpu_recurrence:lengths", 5),
    Part("gpu-recurrence-step", "recurrence", "a step of generation", "gpu_recurrence:step", 3),
    Part("gpu-recurrence-split", "recurrence", "few heads, split or not", "gpu_recurrence:split", 7),
    Part("gpu-recurrence-tokens", "recurrence", "a step equation without chunks", "gpu_recurrence:tokens", 5),
)
ROUTING = (
    Part("gpu-routing-16", "routing", "the best 16 blocks, forward", "gpu_routing:speed_16", 5),
    Part("gpu-routing-backward", "routing", "gradients of the best 16 and 8", "gpu_routing:gradients", 8),
    Part("gpu-routing-8", "routing", "the best 8 blocks, forward", "gpu_routing:speed_8", 5),
    Part("gpu-routing-moba", "routing", "MoBA, both directions", "gpu_routing:moba", 7),
)
DECODE = (Part("gpu-decode", "decode", "a token against a cache: all, window, pages", "gpu_decode:speed", 8),)
REST = (
    Part("gpu-simulator-forward", "simulator", "predicted and measured times, forward", "gpu_simulator:forward", 7),
    Part(
        "gpu-simulator-backward",
        "simulator",
        "predicted and measured times of gradients",
        "gpu_simulator:backward",
        8.5,
    ),
    Part("gpu-simulator-natten", "simulator", "predictions against NATTEN's figures", "gpu_simulator:natten", 1),
    Part("gpu-tune", "simulator", "measured and predicted tile choices", "gpu_trust:tune", 8),
    Part("gpu-memory", "plan", "bytes of calls against the plan's", "gpu_trust:memory", 3),
    Part("gpu-plan-grids", "plan", "tile lists of images and videos", "gpu_plan:grids", 8),
    Part("gpu-plan-lines", "plan", "tile lists of text, up to a million tokens", "gpu_plan:lines", 8),
    Part("gpu-compile", "compile", "first calls, cold and warm", "gpu_compile:first_calls", 7),
    Part("gpu-compile-shapes", "compile", "recompilation for other shapes", "gpu_compile:new_shapes", 4),
)
PARTS: tuple[Part, ...] = (*CORRECT, *FLEX, *RECURRENCE, *ROUTING, *DECODE, *REST)
