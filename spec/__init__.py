"""The `.attn` language: source text → syntax tree → checked program, and the evaluator that defines its meaning."""
