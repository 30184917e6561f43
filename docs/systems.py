"""The systems that the library covers, each with its files: the source of `coverage.md`.

The names are from the survey from which the library was planned: static masks; scores, normalisers and structures;
selections by content; recurrences and scans. `why` names the parts of a system that have no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """A system, the library's files for it or its parts, and why other parts have none."""

    name: str
    files: tuple[str, ...] = ()
    why: str = ""


CONVOLUTION = "convolutions ⊙ input: no query meets a key"
DEEP = (
    "memories of several layers (such as Titans-MLP and TTT-MLP) are weights updated by gradient steps on their own "
    "loss: a state that training owns"
)

TABLES: Mapping[str, tuple[System, ...]] = {
    "Static masks": (
        System("NATTEN / GNA", ("neighborhood_1d", "neighborhood_2d", "neighborhood_3d")),
        System("STA (sliding tile)", ("sliding_tile",)),
        System("Radial Attention", ("radial",)),
        System("SVG spatial / temporal", ("svg",)),
        System("PowerAttention", ("power",)),
        System("LogSparse", ("log_sparse",)),
        System("S2-Attention / DKernel", ("s2_attention",)),
        System("MoA", ("moa",)),
        System("Sparse Transformer", ("sparse_transformer", "sparse_fixed", "strided")),
        System("Longformer", ("longformer",)),
        System("BigBird", ("bigbird",)),
        System("StreamingLLM / A-shape / Tri-shape", ("streaming", "sliding_window")),
        System("LongLoRA S²-Attn / SinkLoRA", ("long_lora", "sink_lora")),
        System("prefix-LM, document, varlen", ("prefix_lm", "document")),
        System("block diffusion (BD3-LM)", ("block_diffusion",)),
        System("Modality-Mutual (AKI)", ("modality_mutual",)),
        System("DaViT window (Swin-like)", ("davit_window",)),
        System("HaloNet", ("halo",)),
        System("FreeSwim", ("freeswim",)),
        System("LinGen TESA", ("lingen_temporal",)),
        System("VideoFactory", ("videofactory",)),
    ),
    "Scores, normalisers, structures": (
        System("ALiBi · T5 bias · Music Transformer · Graphormer", ("alibi", "t5", "music_relative", "graphormer")),
        System("Softcap (Gemma-2)", ("softcap",)),
        System("FoX (forgetting attn)", ("fox",)),
        System("gpt-oss sinks", ("gpt_oss",)),
        System("Differential attention", ("differential",)),
        System("Softplus LSSA / LSSAR", ("softplus_lssa", "softplus_lssar")),
        System("Affine-scaled", ("affine_scaled",), "the average of alpha is state that training owns"),
        System("Landmark attention", ("landmark", "landmark_retrieval")),
        System("Hierarchical self-attention", ("hierarchical",), "two levels of the tree"),
        System("SQA", ("sqa",)),
        System("Attention Residuals", ("attention_residual",)),
        System("DaViT channel", ("davit_channel",)),
        System("LLA / FlashLLA", ("local_linear",)),
        System("Combiner", ("combiner", "combiner_axial", "combiner_log_sparse", "combiner_mixture")),
        System("MonarchAttention / MonarchRT", ("monarch", "monarch_rt"), "one iteration"),
        System("Autoformer", ("autoformer_lags",), "the caller's Fourier transform determines the lags"),
        System("VAN / LKA", (), CONVOLUTION),
    ),
    "Selections by content": (
        System("MoBA", ("moba",)),
        System("FlashMoBA", ("flash_moba",)),
        System("VMoBA", ("vmoba", "vmoba_threshold")),
        System("NSA", ("native_sparse",)),
        System("DSA (DeepSeek)", ("deepseek_sparse",)),
        System("SeerAttention(-R)", ("seer", "seer_decode"), "the trained gate is outside: its output is an input"),
        System("Dynamic Mask Attn", ("dynamic_mask",)),
        System("XAttention", ("xattention",)),
        System("MInference VS / block-sparse", ("minference_vertical_slash", "minference_blocks")),
        System("MMInference grid / boundary", ("mminference_grid", "mminference_boundary")),
        System("AnchorAttention", ("anchor",)),
        System("HiP / InfiniteHiP", ("hip",)),
        System("DHSA", ("dhsa",)),
        System("BiFormer BRA", ("biformer",)),
        System("SVG2", ("svg2",), "the clusters are the caller's"),
        System("VSA", ("vsa",)),
        System("Routing Transformer", ("routing_transformer",), "centroids move in training"),
        System("HyperAttention", ("hyper_attention",), "its causal form, which halves sequences repeatedly"),
        System("Superlinear", ("superlinear",)),
        System("SparseD", ("sparse_d",)),
        System("Rectified SpaAttn", ("rectified",)),
        System("Hybrid Forcing", ("hybrid_forcing",)),
        System("Token Sparse Attention", ("token_sparse",)),
        System("Flux Attention", ("flux",)),
        System("Recycled Attention", ("recycled",)),
        System("TempCache/AnnSA", ("temp_cache",)),
        System("Sparsifiner", ("sparsifiner",)),
        System("SSA", ("ssa_random",)),
    ),
    "Recurrences and scans": (
        System("Linear attn, RetNet, Lightning-2, TNL", ("linear_attention", "retention", "lightning")),
        System("Mamba-2/SSD, Simple-GLA", ("mamba2_ssd",)),
        System("GLA, LightNet, HGRN(2)", ("gla", "lightnet", "hgrn", "hgrn2")),
        System("GSA", ("gsa",)),
        System(
            "DeltaNet, Gated DeltaNet, KDA, Comba, GatedDeltaProduct",
            ("delta_net", "gated_delta_net", "kimi_delta", "comba", "gated_delta_product"),
        ),
        System("RWKV-6 / RWKV-7", ("rwkv6", "rwkv7")),
        System("Log-linear attention", ("log_linear",)),
        System("Mesa-net / test-time regression", ("mesa", "test_time_regression")),
        System(
            "Titans / Miras / TTT",
            (
                *("titans_linear", "yaad_linear", "moneta_linear", "memora_linear", "ttt_linear"),
                "hybrid_window_linear",
            ),
            DEEP,
        ),
        System("Aaren", ("aaren",)),
        System("S4 / S5 / Mamba-1 / ConvS5", ("s5", "mamba1", "convs5_pointwise"), "convolutions between the steps"),
        System(
            "Spatial-Mamba, MHS-VM, MambaMixer, LinGen MA",
            ("spatial_mamba", "mhs_vm", "lingen_ma", "mamba_mixer"),
            "the mixing of earlier layers' outputs (MambaMixer) belongs to the model",
        ),
    ),
    "Other patterns": (
        System("dense and causal attention", ("full", "causal")),
        System("windows and blocks", ("sliding_window", "dilated_window", "blocked")),
        System("trees of drafts (speculative decoding)", ("tree_verify",)),
    ),
}


def systems() -> Iterator[System]:
    """Yield all systems."""
    for part_systems in TABLES.values():
        yield from part_systems


def names() -> set[str]:
    """Return the names of all files of the systems."""
    return {name for system in systems() for name in system.files}
