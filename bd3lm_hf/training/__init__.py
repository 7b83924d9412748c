"""`BD3LMTrainer` and what it takes, averages, resumes from, refuses and publishes."""
