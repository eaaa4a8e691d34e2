#!/bin/sh
# Packs carry/ for a GPU machine that has Python 3.12, torch, triton, transformers, tokenizers, numpy, pyarrow and pytest and no
# network: sh benchmarks/carry.sh PYTHON TOKENIZER TEXT..., 25 MB and more. PYTHON is an environment with torch, in which DeepSpeed's
# wheel is built; TEXT is what fastdistil.prepare takes. With GLUE=FOLDER, a folder of that is carried too. Over there, from the root
# of the repository:
#
#     sh carry/run.sh OUT [--only kernels,step]
#
# Triton's cache, which saves some 30 s of compiling: with PREWARM=PYTHON3.12, an environment with the GPU machine's own versions of
# Python and Triton, kernels are compiled here, without a GPU, and carried along; with TILES= also all of the stage tiles, which takes
# some minutes (TILES=attention those that --only attention chooses). Keep carry/ out of git (.git/info/exclude).
set -eu
python=$1 tokenizer=$2
shift 2
mkdir -p carry/wheels && git describe --always --dirty > carry/commit
get() {
  "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d carry/wheels "$@"
}
get tyro docstring-parser typeguard typing-extensions typing-inspection annotated-types liger-kernel pytest-xdist execnet pytest-timeout \
  pytest-benchmark py-cpuinfo2 rich pygments markdown-it-py mdurl \
  pydantic pydantic-core hypothesis sortedcontainers psutil tqdm einops ninja py-cpuinfo msgpack
"$python" -m pip wheel -q --no-deps -w carry/wheels hjson
DS_BUILD_OPS=0 "$python" -m pip wheel -q --no-deps --no-build-isolation -w carry/wheels 'deepspeed>=0.19.8,<0.20'
data=$(mktemp -d)
"$python" -m fastdistil.prepare "$@" --tokenizer "$tokenizer" --max-length 512 --out "$data"/text
[ -z "${GLUE:-}" ] || cp -rL "$GLUE" "$data"/glue
tar czf carry/data.tgz -C "$data" . && rm -rf "$data"
if [ -n "${PREWARM:-}" ]; then
  rm -rf /tmp/fastdistil-triton && tree=$(mktemp -d)
  git archive HEAD | tar x -C "$tree" # without the C++ kernels, which are built for another torch
  "$PREWARM" -m pip install -q --no-index --no-deps --target "$tree"/site carry/wheels/*.whl
  (cd "$tree" && export TRITON_CACHE_DIR=/tmp/fastdistil-triton PYTHONPATH=.:site && "$PREWARM" -m benchmarks.prewarm &&
    "$PREWARM" -m benchmarks.tiles --compile --only "${TILES-product with GELU}" > /dev/null)
  rm -rf "$tree"
  # What a launch needs of it is the machine code: a fifth.
  find /tmp/fastdistil-triton -type f ! -name '*.cubin' ! -name '*.json' ! -name '*.so' -delete
  tar czf carry/triton.tgz -C /tmp fastdistil-triton # its index names files absolutely
fi
cat > carry/run.sh <<'END'
# See benchmarks/carry.sh.
set -u
here=$(cd "$(dirname "$0")" && pwd)
[ -d /tmp/fastdistil-site ] || python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target /tmp/fastdistil-site "$here"/wheels/*.whl
[ -f "$here"/triton.tgz ] && tar xzf "$here"/triton.tgz -C /tmp
export PYTHONPATH=$PWD:/tmp/fastdistil-site TRITON_CACHE_DIR=/tmp/fastdistil-triton HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export FASTDISTIL_COMMIT="$(cat "$here"/commit)"
mkdir -p /tmp/fastdistil-data && tar xzf "$here"/data.tgz -C /tmp/fastdistil-data
set -- "$@" --shards /tmp/fastdistil-data/text
[ ! -d /tmp/fastdistil-data/glue ] || set -- "$@" --glue /tmp/fastdistil-data/glue
exec python3 -m benchmarks.first_light "$@" --scratch /tmp/first-light
END
du -sh carry
