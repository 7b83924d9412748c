"""`python -m benchmarks.adaptation {demo,arms,speed,qlora}`."""

import sys

from . import arms, costs, demo


PROGRAMS = {"demo": demo.run, "arms": arms.run, "speed": costs.run_speed, "qlora": costs.run_qlora}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in PROGRAMS:
        sys.exit(f"usage: python -m benchmarks.adaptation {{{','.join(PROGRAMS)}}} ...")
    sys.exit(PROGRAMS[sys.argv[1]](sys.argv[2:]))
