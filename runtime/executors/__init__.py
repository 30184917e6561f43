"""Executors: their protocol and table, one folder for each, and what they share."""
