"""``python -m specdec`` is the console script."""

from specdec.cli import main

if __name__ == "__main__":
    main()
