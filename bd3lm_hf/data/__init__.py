"""From texts, tables and chats to the batches that a model reads."""
