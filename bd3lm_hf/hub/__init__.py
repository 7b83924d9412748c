"""To and from the Hub: published checkpoints, what was recorded of a run, the model card, the upload."""
