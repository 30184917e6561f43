"""Differential testing: random patterns as `.attn` text and, separately, as Python closures over fp64 tensors.

`python tests/support/hunting --seconds 3600` (`make hunt`) draws cases until the time is up; every case is determined
by its part and seed alone, and a mismatch prints both.
"""
