"""`python -m alignment`, and so `accelerate launch -m alignment train ...`, is `align`."""

from alignment.cli import main

if __name__ == "__main__":
    main()
