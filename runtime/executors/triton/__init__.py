"""The triton executor: emitted kernels on a GPU, or in Triton's interpreter."""
