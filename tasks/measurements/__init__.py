"""Kinds of records, one file each; tasks/measurement.py says what one is."""
