#!/usr/bin/env bash
# Everything that is measured on a GPU, from a checkout, python3 with torch 2.11 or newer, and wheels.
#
#   benchmarks/gpu.sh [--wheels DIR] [--out DIR] [--only PART,PART] [--minutes M] [--rehearse]
#
# --wheels    a folder of wheels; those whose module cannot be imported here are unpacked beside the results
# --out       where records (JSON) and logs go, and records.tar.gz with all of them; default benchmarks/results/gpu
# --only      some of: tests regions pipeline peers grid curve attention engines checkpointing, or one of their parts,
#             e.g. grid-small
# --minutes   it has ended by then, default 9; the most important comes first, and what was left out is named at the end, to be
#             given to a second call: all of it takes two or three, the more the less is compiled already
# --rehearse  the same on a CPU, with little of everything: does the script work?
#
# What is compiled stays in TORCHINDUCTOR_CACHE_DIR, by default /tmp/personmae-inductor. A part that fails or takes too long is
# told and does not end the others; its record holds what was measured by then. The exit code is the number of such parts.
# The peers' loader needs 7 GB of /dev/shm (a container's --shm-size).
#
# Modules that must be importable, by the names of their wheels:
# every part    numpy nvidia-ml-py prometheus-client jaxtyping wadler-lindig rich markdown-it-py mdurl pygments safetensors
#               opencv-python-headless simplejpeg xxhash pyyaml pydantic pydantic-core annotated-types typing-inspection
#               typing-extensions; with torch itself come filelock fsspec jinja2 networkx setuptools sympy triton
# shards        (of tests, pipeline, peers, curve) lmdb mosaicml-streaming, and what the latter imports: brotli catalogue cramjam
#               python-snappy zstd matplotlib contourpy cycler fonttools kiwisolver pyparsing python-dateutil six pillow
#               torchvision tqdm requests certifi charset-normalizer idna urllib3 transformers tokenizers huggingface-hub hf-xet
#               regex packaging
# tests         beartype pytest iniconfig pluggy packaging pytest-timeout boto3 botocore jmespath s3transfer scipy scikit-learn
#               joblib threadpoolctl
# peers         timm
# engines       deepspeed hjson einops msgpack ninja packaging psutil py-cpuinfo tqdm
set -uo pipefail
cd "$(dirname "$0")/.."
ROOT=$PWD WHEELS='' OUT=benchmarks/results/gpu REHEARSE='' MINUTES=9
ONLY=tests,regions,pipeline,peers,grid,curve,attention,engines,checkpointing
while [ $# -gt 0 ]; do
  case $1 in
    --wheels) WHEELS=$(cd "$2" && pwd); shift 2 ;;
    --out) OUT=$2; shift 2 ;;
    --only) ONLY=$2; shift 2 ;;
    --minutes) MINUTES=$2; shift 2 ;;
    --rehearse) REHEARSE=1; shift ;;
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit ;;
    *) echo "unknown option $1; see $0 --help"; exit 78 ;;
  esac
done
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) && LOGS=$OUT/logs WORK=$(mktemp -d) && mkdir -p "$LOGS"
trap 'rm -rf "$WORK"' EXIT
export PYTHONPATH=$ROOT:$WORK/site${PYTHONPATH:+:$PYTHONPATH} DS_BUILD_OPS=0
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/personmae-inductor}
START=$SECONDS FAILED=0 LEFT=

chosen() {  # is one of these parts?
  local name
  for name; do [[ ,$ONLY, != *,$name,* ]] || return 0; done
  return 1
}

archive() {  # all records in one file, for a machine that gives back few
  tar -czf "$WORK/records.tar.gz" -C "$OUT" --exclude=records.tar.gz . && mv "$WORK/records.tar.gz" "$OUT/records.tar.gz"
}

# part NAME SECONDS COMMAND...: runs it with a limit, its output in a log; not at all where less than half of the limit is left
part() {
  local name=$1 limit=$2 begun=$SECONDS code rest=$((60 * MINUTES - SECONDS + START - 5))
  shift 2
  chosen "$name" "${name%%-*}" || return 0
  if [ $((2 * rest)) -lt "$limit" ]; then LEFT=$LEFT,$name; return 0; fi
  timeout --kill-after=10 $((rest < limit ? rest : limit)) "$@" >"$LOGS/$name.log" 2>&1
  code=$?
  echo "$name: $([ $code = 0 ] && echo done || echo "FAILED ($code), see $LOGS/$name.log") after $((SECONDS - begun)) s, $((SECONDS - START)) s in all"
  if [ $code != 0 ]; then FAILED=$((FAILED + 1)); tail -n 5 "$LOGS/$name.log" | cut -c 1-300; fi
  archive
}

unpack() {  # wheels of modules that are not here
  for wheel in "$WHEELS"/*.whl; do
    top=$($PYTHON - "$wheel" <<'END'
import importlib.util, sys, zipfile
names = {n.split("/")[0].removesuffix(".py") for n in zipfile.ZipFile(sys.argv[1]).namelist() if ".dist-info" not in n and ".data/" not in n}
names = {n.split(".")[0] for n in names if n.split(".")[0].isidentifier()}
print("" if names and all(importlib.util.find_spec(n) for n in names) else "missing")
END
    )
    [ -z "$top" ] || $PYTHON -m pip install --quiet --no-deps --no-index --target "$WORK/site" "$wheel" || echo "cannot install $wheel"
  done
}
[ -z "$WHEELS" ] || unpack

if [ -z "$REHEARSE" ]; then
  $PYTHON -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "a GPU that torch can use is required and there is none; --rehearse tries the script on a CPU"; exit 78; }
  IMAGES=8000
else
  export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
  IMAGES=600
fi
GPU_TESTS=$(grep -rlF --include='test_*.py' mark.gpu tests)  # no other module is imported, nor what it needs
! chosen tests || timeout 60 $PYTHON -m personmae doctor >"$LOGS/doctor.log" 2>&1
write_shards() {
  $PYTHON -m personmae synth "$WORK/data" --pool-images "$IMAGES" && $PYTHON -m personmae shards write "$WORK/data/pool" "$WORK/shards" --shard-mb 8
}
case ,$ONLY in *,pipeline* | *,peers* | *,curve*)
  export -f write_shards && export PYTHON WORK IMAGES
  if timeout --kill-after=10 50 bash -c write_shards >"$LOGS/shards.log" 2>&1; then
    echo "shards of $IMAGES drawn people after $((SECONDS - START)) s"
  else
    echo "no shards, so neither pipeline nor peers nor curve: see $LOGS/shards.log"
    FAILED=$((FAILED + 1)) ONLY=$(tr , '\n' <<<"$ONLY" | grep -vE '^(pipeline|peers|curve)' | paste -sd ,)
  fi ;;
esac
SHARDS=$WORK/shards STEP="$PYTHON -m personmae bench step" PEERS="$PYTHON benchmarks/peers/compare.py --shards $SHARDS --no-fp32" CURVE="$PYTHON benchmarks/curve.py $SHARDS"

if [ -z "$REHEARSE" ]; then
  part tests 150 $PYTHON -m pytest -q -m gpu -p no:cacheprovider $GPU_TESTS
  part regions 60 $PYTHON benchmarks/regions.py --sizes 256x128 --images full --out "$OUT/regions.json"
  part pipeline-base 110 $STEP --sizes base --batches 1024 --compile on --crop-backends torch,triton --shards "$SHARDS" --steps 15 --rounds 2 --out "$OUT/pipeline-base.json"
  part pipeline-small 90 $STEP --sizes small --batches 1024 --compile on --shards "$SHARDS" --steps 20 --rounds 2 --out "$OUT/pipeline-small.json"
  part peers-base 80 $PEERS --size base --img-size 256 128 --batch-size 256 --compile --rounds 2 --steps 48 --out "$OUT/peers-base.json"
  part grid-base 120 $STEP --sizes base --batches 64,1024 --compile off,on,graph --steps 10 --rounds 2 --out "$OUT/grid-base.json"
  part curve-compiled 120 $CURVE --size small --img-size 256 128 --batch-size 128 --steps 200 --out "$OUT/curve-compiled.json"
  part attention 50 $PYTHON benchmarks/attention.py --out "$OUT/attention.json"
  part peers-small 75 $PEERS --size small --img-size 256 128 --batch-size 256 --compile --rounds 2 --steps 64 --out "$OUT/peers-small.json"
  part grid-small 100 $STEP --sizes small --batches 64,1024 --compile off,on,graph --crop-backends torch,triton --steps 10 --rounds 2 --out "$OUT/grid-small.json"
  part curve-graphs 120 $CURVE --size small --img-size 256 128 --batch-size 128 --steps 200 --graphs --out "$OUT/curve-graphs.json"
  part engines-eager 75 $STEP --sizes base --batches 256 --engines "plain,native,deepspeed 1,fsdp" --steps 8 --rounds 2 --out "$OUT/engines-eager.json"
  part engines-compiled 75 $STEP --sizes base --batches 256 --engines native,fsdp --compile on --steps 8 --rounds 2 --out "$OUT/engines-compiled.json"
  part checkpointing 75 $STEP --sizes base --batches 512 --checkpointing none,selective,full --compile on --steps 8 --rounds 2 --out "$OUT/checkpointing.json"
else
  part tests 120 $PYTHON -m pytest -q -m gpu -p no:cacheprovider $GPU_TESTS
  part regions 60 $PYTHON benchmarks/regions.py --out "$OUT/regions.json"
  part pipeline 100 $STEP --sizes micro --batches 32 --img-size 128x64 --shards "$SHARDS" --steps 2 --rounds 1 --out "$OUT/pipeline.json"
  part peers 100 $PEERS --batch-size 16 --rounds 1 --steps 2 --out "$OUT/peers.json"
  part grid 100 $STEP --sizes micro --batches 8 --img-size 128x64 --steps 2 --rounds 1 --out "$OUT/grid.json"
  part curve 150 $CURVE --batch-size 8 --steps 8 --eager --out "$OUT/curve.json"
  part attention 60 $PYTHON benchmarks/attention.py --batch-size 4 --sizes small --repeats 2 --out "$OUT/attention.json"
  part engines 100 $STEP --sizes micro --batches 8 --img-size 128x64 --engines "plain,native,deepspeed 1,fsdp" --steps 2 --rounds 1 --out "$OUT/engines.json"
  part checkpointing 60 $STEP --sizes micro --batches 8 --img-size 128x64 --checkpointing none,full --steps 2 --rounds 1 --out "$OUT/checkpointing.json"
fi
archive
[ -z "$LEFT" ] || echo "left out for lack of time: $0 --only ${LEFT#,}"
echo "$FAILED parts failed; $((SECONDS - START)) s in all; records in $OUT, and all of them in $OUT/records.tar.gz"
exit "$FAILED"
