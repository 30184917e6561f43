"""What a program means: parameters bound, expressions evaluated exactly, masks row by row."""
