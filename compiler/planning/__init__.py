"""Planning: from relations to runs of tiles, pieces, a schedule and its cost."""
