"""From YAML to a checked plan; nothing here runs anything. Imports no torch."""
