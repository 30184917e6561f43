"""The commands of `attnc`, a module each: `add` describes the arguments, `run` does the work and returns the status."""
