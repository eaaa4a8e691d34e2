#!/bin/sh
# Everything of the fused losses that needs a GPU: tests, benchmarks, one short table. From the root of the repository, on a
# machine that has torch, triton, transformers, numpy, pytest and pytest-benchmark. Exit status: of the tests, else of the
# benchmarks.
export PYTHONPATH=. HF_HUB_OFFLINE=1
python -m pytest tests/test_distill.py tests/test_linear_distill.py tests/test_cosine.py tests/test_losses.py \
  -q -p no:cacheprovider
tests=$?
python -m pytest benchmarks/bench_distill.py benchmarks/bench_linear_distill.py benchmarks/bench_cosine.py \
  -q -s -p no:cacheprovider --benchmark-columns=median,min,rounds
benchmarks=$?
python -m benchmarks._harness
[ "$tests" -ne 0 ] && exit "$tests"
exit "$benchmarks"
