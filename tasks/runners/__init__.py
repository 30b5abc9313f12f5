"""Who runs the jobs of a flow: one module each, chosen in choice.py. Imports no torch."""
