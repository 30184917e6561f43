"""What outlives a process: numbers about this machine, as JSON in a private folder. Nothing in it is ever executed."""
