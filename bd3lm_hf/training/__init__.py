"""Training: arguments, trainers, and what they keep of a run."""
