"""The meaning of a program: parameters bound, expressions evaluated exactly, masks row by row."""
