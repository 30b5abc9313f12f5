"""What is kept: results by identity, their measurements, and the journal of each run. Imports no torch."""
