"""The model: what `save_pretrained` copies beside the weights, and `trust_remote_code=True` loads from there."""
