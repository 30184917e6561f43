"""Derivation of forms that run chunk by chunk from the steps of a recurrence."""
