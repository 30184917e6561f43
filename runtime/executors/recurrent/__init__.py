"""Recurrences, computed token by token or chunk by chunk.

`pattern_recurrence` checks a call and chooses how to run it: `passes` runs the derived form, `token_loop` the steps as
they are written. `token_values` computes the values of tokens for both, `document_runs` finds where documents begin,
and `checkpointed` runs a call in parts. `borders` and `border_gradients` keep NaN and overflow on their side of a
document or a reset.

- Linear states in chunks: `linear` (the interface), `recorded` (autograd), `chunked`, `chunk_layout`, `chunk_states`,
  `chunk_forms`, `decayed_columns`, `decays`, `levels`, `triangle`.
- States with an elementwise update: `entries`, `scan`, `stretch_scan`, `prefixes`; `monoids` for running maxima and
  log-sums.
- Coupled states, which read each other: `coupled_tokens`, `coupled_chunks`, `coupled_stretches`, `pair_weights`.
- `solves`: conjugate gradients.
"""
