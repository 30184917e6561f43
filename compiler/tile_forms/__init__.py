"""Forms in which a kernel is told its live tiles: runs, lists, rectangles, loop bounds; by tile row or tile column."""
