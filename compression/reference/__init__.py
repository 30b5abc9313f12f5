"""The model and the data that come with edgepress: a small generated world, and the script that trains on it."""
