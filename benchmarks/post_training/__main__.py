"""`python -m benchmarks.post_training {arms,speculation}`."""

import sys

from . import arms, speculation


PROGRAMS = {"arms": arms.run, "speculation": speculation.run}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in PROGRAMS:
        sys.exit(f"usage: python -m benchmarks.post_training {{{','.join(PROGRAMS)}}} ...")
    sys.exit(PROGRAMS[sys.argv[1]](sys.argv[2:]))
