"""Receptive fields: what a token knows of after some layers."""
