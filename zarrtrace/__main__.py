"""``python -m zarrtrace`` is the command ``zarrtrace``."""

from zarrtrace.cli import main

if __name__ == "__main__":
    main()
