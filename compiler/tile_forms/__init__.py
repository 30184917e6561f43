"""The forms in which a kernel receives its live tiles: runs and lists, by tile row or by tile column."""
