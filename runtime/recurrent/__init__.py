"""Linear recurrences in chunk form: what the state of a token sequence is, read and corrected token by token."""
