"""Warnings about patterns that compile."""
