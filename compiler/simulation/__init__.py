"""How fast a pattern can be on a named machine, before anything runs: a ladder of bounds, and the schedule behind it.

machine → tile work of an order → clocks of a tile → work items over the machine → ladder.
"""
