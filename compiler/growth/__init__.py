"""Growth of a pattern's work with its length: formulas for visible pairs, live tiles and cost, and their derivation.

A law is found in one of four ways, always from the relation and never from the name of a pattern.

- Where conditions compare q, k, q - k and fractions of the length n with constants, the counts are, for each remainder
  of n modulo a period and from some n on, a polynomial of degree at most 2. The period and the start follow from the
  relation, with a proof (`periods`). The polynomials are interpolated from a few exact counts, checked at other lengths
  (`periodic`), and written as one formula of n and its remainder r (`polynomials`). Windows, sinks, blocks, strides and
  their unions are of this kind.
- Blocks at distances that are powers of two are split off; the split is proved, and sympy sums the blocks: n log n
  (`powers`).
- Where a bound or a step is the root of n, the distances q - k are arithmetic progressions with known sums, and unions
  are counted by inclusion and exclusion: n√n (`roots`).
- All other relations are fitted to counts, and the result says so (`fitted`).

Counts are exact and made tile by tile: no n × n mask is allocated (`counts`).
"""
