"""Executors: the dense reference, torch on the CPU, Triton kernels, recurrences, selections."""
