"""`python -m mover` is the command `mover`."""

from mover.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
