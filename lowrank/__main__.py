"""`python -m lowrank` runs the command `lowrank`."""

from .cli import main

if __name__ == "__main__":
    main()
