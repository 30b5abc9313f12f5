"""The algorithms, as functions on tensors, modules and checkpoint directories. Knows neither Prefect nor MLflow."""
