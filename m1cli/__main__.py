"""``python -m m1cli`` is ``m1``; training processes are started this way."""

from m1cli.app import main

if __name__ == "__main__":
    main()
