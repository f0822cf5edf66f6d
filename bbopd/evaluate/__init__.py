"""How good a student is: bits per byte of held-out text, agreement with its teacher, and its answers side by side."""
