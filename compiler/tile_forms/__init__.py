"""The forms in which kernels receive their live tiles: runs and lists, by tile row or by tile column."""
