"""`python -m gte_deploy` is `gte-deploy`."""

import sys

from gte_deploy.cli import main

if __name__ == "__main__":
    sys.exit(main())
