"""Checks of users' input: numbers, keywords, files, and the texts of the errors that refuse them."""
