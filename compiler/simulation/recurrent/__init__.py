"""Simulation of recurrences: the work of a chunk, the plan of every pass, and a ladder from memory traffic to time.

derivation and sizes → forms → work of a chunk → kernels of a plan → ladder.
"""
