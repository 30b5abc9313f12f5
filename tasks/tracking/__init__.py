"""MLflow: what a run looks like there, derived from journal and records. Imports no torch."""
