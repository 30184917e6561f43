"""Planners and plans by call shape, and the relations that they are built from."""
