#!/bin/sh
# What a machine with a GPU shows of this package, in about eight minutes and without an installation:
#
#     PYTHON=python3 sh benchmarks/gpu.sh
#
# First what only a GPU has, then figures, then the test suite on the GPU, as far as it comes in its time.
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
export PYTHONPATH=. TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
test -e bd3lm_hf/modeling || ln -s ../modeling bd3lm_hf/modeling
"$PYTHON" -c 'import torch, transformers; print(torch.cuda.get_device_name(), torch.__version__, transformers.__version__)' || exit 1

WORKERS=$("$PYTHON" -c 'import xdist' 2>/dev/null && echo '-n 6 --dist loadfile')
timeout -s INT 90 "$PYTHON" -m pytest -q -rs tests/test_gpu.py
only_gpu=$?
timeout 200 "$PYTHON" -m benchmarks.gpu --seconds 150
figures=$?
timeout -s INT "${TEST_SECONDS:-180}" "$PYTHON" -m pytest -q -rs --device cuda $WORKERS
tests=$?
echo "exit status: test_gpu.py $only_gpu, figures $figures, tests on the GPU $tests (2: stopped by its time)"
test "$only_gpu$figures$tests" = 000
