"""Ways to write text that stand beside the denoising loop of the models."""
