"""`compile_attention`, the callable that it returns, and patterns that are analysed without being compiled."""
