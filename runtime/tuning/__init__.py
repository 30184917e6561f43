"""Choosing by the clock among the first few schedules that the cost model would choose, and keeping what was found."""
