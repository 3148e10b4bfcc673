import sys

from benchmarks.device.run import main

if __name__ == "__main__":
    sys.exit(main())
