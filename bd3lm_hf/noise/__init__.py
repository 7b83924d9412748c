"""The noise of training and evaluation: how it is drawn, the law of its numbers, the intervals it is drawn from."""
