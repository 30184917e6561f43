"""Choosing schedules by measurement among the first few that the cost model ranks, and storing the choices."""
