"""Receptive fields: the tokens that a token knows of after some layers."""
