"""Patterns with everything that is known without tensors: relations, growth, simulations, layers."""
