"""Pictures of patterns: the data of a picture is collected first, then printed as SVG or as text."""
