"""Kinds of measurements, one file each; found by scanning this folder (tasks/measurement/measurement.py)."""
