"""From a syntax tree to a program: what every name stands for, within and across files."""
