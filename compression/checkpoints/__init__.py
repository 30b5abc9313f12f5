"""Checkpoint directories: read, normalise, load, stream and write them, in every layout."""
