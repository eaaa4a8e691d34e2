#!/bin/sh
# Everything that needs a GPU: tests of the operators, their benchmarks, one short table, the whole step. Run it from the
# root of the repository, where torch, triton, transformers, numpy, pytest and pytest-benchmark are installed. Its exit
# status is that of the tests, else of the first benchmark that failed.
export PYTHONPATH=. HF_HUB_OFFLINE=1
python -m pytest -m "triton and not soak" -q -p no:cacheprovider tests/kernels
tests=$?
python -m pytest tests/training/test_objective.py tests/training/test_teacher.py::test_overlap_changes_no_bit_on_a_gpu \
  tests/training/test_teacher.py::test_memory_is_not_given_away_while_the_student_reads \
  -q -p no:cacheprovider || tests=1
if python -c "import psutil"; then
  python -m pytest tests/training/test_memory.py::test_on_a_gpu -q -p no:cacheprovider || tests=1
else
  echo "not run: predicted against measured memory, for want of psutil"
fi
python -m pytest benchmarks/bench_*.py --ignore=benchmarks/bench_prepare.py \
  -q -s -p no:cacheprovider --benchmark-columns=median,min,rounds
benchmarks=$?
python -m benchmarks._harness
python -m benchmarks.step
step=$?
[ "$tests" -ne 0 ] && exit "$tests"
[ "$benchmarks" -ne 0 ] && exit "$benchmarks"
exit "$step"
