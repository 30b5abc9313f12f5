"""Stages: what one is, how one is executed, measured, tracked and stored. Imports no torch until a stage runs."""
