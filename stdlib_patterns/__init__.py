"""The standard library: one pattern a file, file stem = pattern name."""
