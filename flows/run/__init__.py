"""Carry out a plan: the pipeline, resuming, deployments, and what MLflow hears of a whole run. Imports no torch."""
