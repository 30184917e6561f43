"""From bytes to a syntax tree: text, layout, limits, grammar, and what to say when a text does not parse."""
