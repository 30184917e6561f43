"""Recurrences, computed token by token or chunk by chunk.

`pattern_recurrence` checks a call and chooses how to run it: `passes` runs the derived form, `token_loop` the steps as
they are written. `token_values` computes the values of tokens for both, `call_tokens` finds where documents begin and
cuts calls, and `checkpointed` runs a call in parts. `borders` keeps NaN and overflow on their side of a document or a
reset. `recorded` puts all work under autograd, and recomputes spans of tokens in the backward pass.

- Linear states in chunks: `linear` (the interface), `linear_inputs`, `chunk_layout`, `chunk_states`, `chunk_forms`,
  `decays`, `levels`.
- States with an elementwise update: `entries`, `stretch_scan`, `prefixes`; `monoids` for running maxima and log-sums.
- Coupled states, which read each other: `coupled_tokens`, `coupled_chunks`.
- `solves`: conjugate gradients.
"""
