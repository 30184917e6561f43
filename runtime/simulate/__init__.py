"""Simulations of calls by their shapes: at one size, over many, and break-even lengths."""
