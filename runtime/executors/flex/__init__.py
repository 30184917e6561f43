"""FlexAttention's mask_mod, score_mod and BlockMask, made from a relation and its score."""
