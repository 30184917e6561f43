"""The commands of `attnc`, one module each: `add` describes the arguments, `run` does the work and returns the status."""
