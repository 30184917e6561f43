"""Simulation: predict the time of a pattern on a named machine as a ladder of bounds, with the schedule behind it.

machine → tile work of an order → clocks of a tile → work items over the machine → ladder.
"""
