"""Checks of what users bring: numbers, names, files, and the text of the errors that refuse them."""
