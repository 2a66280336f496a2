"""Small data that needs no download: real handwritten digits and rendered scenes, with captions."""
