"""Choices made by measurement: their keys, records and tables, and the schedules to choose from."""
