"""The arms of the literature side by side: the same code, data and budgets, and a table that says what the differences are worth."""
