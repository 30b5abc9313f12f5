"""One file a kind of stage; found by scanning this folder (tasks/stage.py)."""
