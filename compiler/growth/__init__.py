"""How the work of a pattern grows with its length: visible pairs, live tiles and cost as formulas, and why.

Four ways lead to a law; none goes by the names of patterns.

- Conditions that compare q, k, q - k and shares of the length n with constants make counts that are, for each remainder
  of n by a period, a polynomial of degree at most 2 from some n on. Both are read off the relation, with a proof
  (`periods`). The polynomials follow from a few exact counts and are checked at others (`periodic`), and become one
  formula of n and its remainder r (`polynomials`). Windows, sinks, blocks, strides and their unions are of this kind.
- Blocks at distances that are powers of two are split off; that the split is right is proved, and sympy sums the rest:
  n log n (`powers`).
- Where a bound or a step is the root of n, the distances q - k are arithmetic progressions, whose sums are known, and
  unions are taken by inclusion and exclusion: n√n (`roots`).
- What is left is fitted to counts, and says so (`fitted`).

Counts are exact and by tiles: nothing of the size n × n is made (`counts`).
"""
