"""Let a teacher write a corpus to train on."""
