"""GPU kernels of one attention: how its tiles are walked, and the Triton text that walks them."""
