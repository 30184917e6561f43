"""Measurement of this machine's rates."""
