#!/bin/sh
# Everything that needs a GPU: tests of the operators, their benchmarks, one short table, the whole step. From the root of the
# repository, on a machine that has torch, triton, transformers, numpy, pytest and pytest-benchmark. Exit status: of the tests,
# else of the first benchmark that failed.
export PYTHONPATH=. HF_HUB_OFFLINE=1
python -m pytest tests/kernels/test_distill.py tests/kernels/test_linear_distill.py tests/kernels/test_cosine.py tests/kernels/test_dropout.py \
  tests/kernels/test_attention.py tests/kernels/test_layernorm.py tests/kernels/test_gelu.py tests/kernels/test_fp8_rows.py tests/training/test_objective.py \
  tests/training/test_teacher.py::test_overlap_changes_no_bit_on_a_gpu tests/training/test_teacher.py::test_memory_is_not_given_away_while_the_student_reads \
  -q -p no:cacheprovider
tests=$?
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
