"""A page and a JSON API over an index or a model: search, classification and chat, on this machine."""
