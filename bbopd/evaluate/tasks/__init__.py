"""Tasks: one family a file, and `load.load_tasks`, which makes them of what was named."""
