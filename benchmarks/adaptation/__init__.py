"""From an autoregressive model to block diffusion, with a real model: SmolLM2-135M-Instruct."""
