"""What a person types and sees: one file a command group. Imports no torch."""
