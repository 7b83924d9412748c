"""An engine that writes for many requests at once, and the OpenAI-compatible server around it."""
