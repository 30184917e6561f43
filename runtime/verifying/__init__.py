"""`attnc verify`: which call to compare, what the evaluator says of it, and how far the executors are from that."""
