"""Whether two patterns are equal: their normal forms, their pairs up to a length, and a proof for every length."""
