"""What follows adaptation, measured on SmolLM2: distillation beside likelihood, and self-speculation."""
