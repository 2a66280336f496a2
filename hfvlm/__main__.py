"""`python -m hfvlm`."""

from hfvlm.cli import main

main()
