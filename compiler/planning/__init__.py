"""From relations to a plan: runs of tiles, pieces, the schedule, and its cost."""
