"""Linear recurrences by kernels."""
