"""What touches torch, the disk and the terminal: executors, the `Attention` callable, the command line."""
