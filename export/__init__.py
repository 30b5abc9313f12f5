"""Writers of every edge format, their runtimes, and their proofs against the checkpoint. Knows neither Prefect nor MLflow."""
