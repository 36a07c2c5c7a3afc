"""Makes the environments of peers that need other versions of our requirements; see side_by_side/environments.py.

    python benchmarks/peers.py                   # all
    python benchmarks/peers.py openvino onnx     # some

They lie in build/peers/, are kept, and take over 1 GB each. benchmarks/inference.py lists a peer whose environment is
missing, or could not be made, with the reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from side_by_side.environments import REQUIREMENTS, make, requirements_of

from gte_deploy.tuning.measure import WorkerError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(REQUIREMENTS)} (default: all)")
    names = parser.parse_args(argv).names or list(REQUIREMENTS)
    if unknown := set(names) - set(REQUIREMENTS):
        parser.error(f"there is no environment {', '.join(sorted(unknown))}; there are {', '.join(REQUIREMENTS)}")
    failed = False
    for name in names:
        try:
            print(f"{name}: {make(name, requirements_of(name))}")
        except WorkerError as error:
            failed = True
            print(f"{name}: {error}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
