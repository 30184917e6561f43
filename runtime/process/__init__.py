"""State of the process: environment variables, bounded caches, constants on devices, rows of the profiler."""
