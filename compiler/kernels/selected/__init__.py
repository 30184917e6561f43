"""The kernels of attention to chosen places.

For each place the queries that chose it are gathered, a tile of them at a time, and meet its keys (`forward`, `dq`);
what a row gets from its places is put together afterwards (`merge`, `sum`). For their own gradients, keys of a place
meet all queries that chose it in one program (`dkdv`).
"""
