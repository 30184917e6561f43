"""Data that outlives a process: measurements of this machine, as JSON in a private folder. Nothing is ever executed."""
