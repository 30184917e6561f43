"""From a checked program to a plan: pattern IR, facts found by analysis, tiles, pieces."""
