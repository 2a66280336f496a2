"""Models at work: embedding, searching."""
