"""What is measured of a result, and what follows from it: records, gates and verdicts. Imports no torch."""
