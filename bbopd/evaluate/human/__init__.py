"""People as judges: a blind page to rate answers on (`page`), and what the ratings of several people come to (`results`)."""
