"""How good a model is: bits per byte of held-out text, agreement with its teacher, tasks, and its answers side by side."""
