"""Types, stages, guards and size of a resolved program."""
