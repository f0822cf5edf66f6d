"""What is looked at before a run spends anything: the run's own checks, one by one, and probes of what it will meet."""
