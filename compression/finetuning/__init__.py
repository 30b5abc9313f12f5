"""Fine-tune on next tokens: every weight, or low-rank adapters. Importing the package imports no torch."""
