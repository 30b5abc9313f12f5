"""Run a plan: the pipeline, resuming, deployments, and the records of a whole run in MLflow. Imports no torch."""
