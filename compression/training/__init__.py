"""Train a model: the one loop, its settings, and the students that it trains. Importing the package imports no torch."""
