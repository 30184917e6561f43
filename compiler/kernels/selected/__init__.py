"""The kernels of attention to selected blocks.

For each block, the queries that selected it are gathered, one tile at a time, and meet the block's keys (`forward`,
`dq`); the partial results of a row are merged afterwards (`merge`, `sum`). For the gradients of keys, one program lets
keys of a block meet all queries that selected the block (`dkdv`).
"""
