"""Texts of patterns: the library, files, identities that travel in graphs, and all errors of a text."""
