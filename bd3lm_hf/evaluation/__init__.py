"""How well a model predicts text, how much the loss varies with its noise, and what samples are worth."""
