"""`python -m mimfast`, which is also how torchrun starts it."""

import sys

from mimfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
