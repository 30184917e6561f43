"""The commands of `attnc`, one module each: `add` adds the arguments to a parser, `run` returns the exit status."""
