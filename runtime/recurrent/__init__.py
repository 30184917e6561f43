"""Recurrences, token after token and chunk by chunk.

`call` takes a call apart and `passes` runs what was derived of it, or `token_loop` its lines; `token_values` are the
values of tokens in either, `documents` where they begin anew; `checkpointed` does either part by part.

- Linear states in chunks: `linear` (the interface), `recorded` (autograd), `chunked`, `layout`, `states`, `forms`,
  `columns`, `decays`, `levels`, `triangle`.
- States entry by entry: `entries`, `scan`, `stretches`, `prefixes`; `monoids` for running maxima and log-sums.
- States that read each other: `coupled`, `coupled_chunks`, `coupled_stretches`, `pair_weights`.
- `solves`: by conjugate gradients.
"""
