"""What a machine with a GPU shows of this package, in six minutes: `make gpu`, or `python -m benchmarks.gpu`."""
