"""Models at work: embedding, searching, conversations."""
