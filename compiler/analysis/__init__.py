"""Facts about relations: exact values, bounds and classes over boxes, live tiles."""
