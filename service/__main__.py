"""Runs the command line with `python -m service`, as the program `chat-history` does."""

from service.cli import main

if __name__ == "__main__":
    main()
