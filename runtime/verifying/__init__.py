"""The parts of `attnc verify`: select a call, evaluate it with the oracle, and compare the executors with it."""
