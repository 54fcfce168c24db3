"""`python -m mechreward`: the command line."""

from mechreward.cli import main

if __name__ == "__main__":
    main()
