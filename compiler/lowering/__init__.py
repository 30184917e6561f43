"""From a checked program to the pattern IR, and from the IR to the relations of one call."""
