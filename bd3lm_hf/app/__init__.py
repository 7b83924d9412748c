"""
A page in the browser on which one watches a block diffusion model write.

What stands in this folder imports torch, Transformers, gradio and its own siblings, so that it works in a Space beside
a checkpoint that carries its own code, without `bd3lm_hf`.
"""

from .page import launch_options, make_page


__all__ = ["launch_options", "make_page"]
