"""Makes ``python -m m1cli`` the same as ``m1``; training processes are started this way."""

from m1cli.app import main

if __name__ == "__main__":
    main()
