"""The reference executor: dense attention straight from the IR."""
