"""The cpu executor: the pieces of a plan as calls of torch's flash kernel on strided views, forward and backward."""
