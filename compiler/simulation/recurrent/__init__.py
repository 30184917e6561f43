"""How fast a recurrence can be on a machine: what a chunk costs, in which plan, and a ladder from the memory down.

derivation and sizes → forms → work of a chunk → kernels of a plan → ladder.
"""
