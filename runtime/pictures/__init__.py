"""Pictures of patterns: what one shows is gathered, then printed as SVG or as text."""
