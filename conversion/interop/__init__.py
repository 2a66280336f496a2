"""What goes to and from the folders of transformers' own classes, by architecture."""
