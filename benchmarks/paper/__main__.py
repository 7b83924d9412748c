"""All experiments, one after the other, and the page: `python -m benchmarks.paper`, with the flags of any of them."""

from .experiment import run
from .report import EXPERIMENTS, main


if __name__ == "__main__":
    for name, module in EXPERIMENTS.items():
        run(name, __doc__, module.measure)
    main([])
