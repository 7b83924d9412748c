"""The findings of the block diffusion paper (arXiv 2503.09573) at the scale of the machine at hand: a module each."""
