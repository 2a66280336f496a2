"""From the authors' files to folders, and from folders to the Hub: convert, export, verify, merge, push."""
