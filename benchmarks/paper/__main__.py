"""
All experiments, one after the other, and the page: `python -m benchmarks.paper`, with the flags of any of them.

With `--slice NAME` one slice, of minutes, for one seed: see `benchmarks/paper/slices.py`.
"""

import sys


if __name__ == "__main__":
    if any(argument.split("=")[0] == "--slice" for argument in sys.argv[1:]):
        from . import slices

        slices.main()
    else:
        from .experiment import run
        from .report import EXPERIMENTS, main

        for name, module in EXPERIMENTS.items():
            run(name, __doc__, module.measure)
        main([])
