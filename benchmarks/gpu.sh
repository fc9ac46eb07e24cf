#!/usr/bin/env bash
# Everything that is measured on a GPU, in under nine minutes, from a checkout, python3 with torch 2.11 or newer, and wheels.
#
#   benchmarks/gpu.sh [--wheels DIR] [--out DIR] [--only PART,PART] [--rehearse]
#
# --wheels    a folder of wheels; those whose module cannot be imported here are unpacked beside the results
# --out       where records (JSON) and logs go; default benchmarks/results/gpu
# --only      some of: tests attention regions grid pipeline peers curve deepspeed
# --rehearse  the same on a CPU, with little of everything: does the script work?
#
# A part that fails or takes too long is told and does not end the others. The exit code is the number of such parts.
set -uo pipefail
cd "$(dirname "$0")/.."
ROOT=$PWD WHEELS='' OUT=benchmarks/results/gpu REHEARSE='' ONLY=tests,attention,regions,grid,pipeline,peers,curve,deepspeed
while [ $# -gt 0 ]; do
  case $1 in
    --wheels) WHEELS=$(cd "$2" && pwd); shift 2 ;;
    --out) OUT=$2; shift 2 ;;
    --only) ONLY=$2; shift 2 ;;
    --rehearse) REHEARSE=1; shift ;;
    -h | --help) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit ;;
    *) echo "unknown option $1; see $0 --help"; exit 78 ;;
  esac
done
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) && LOGS=$OUT/logs WORK=$(mktemp -d) && mkdir -p "$LOGS"
trap 'rm -rf "$WORK"' EXIT
export PYTHONPATH=$ROOT:$WORK/site${PYTHONPATH:+:$PYTHONPATH} DS_BUILD_OPS=0 TORCHINDUCTOR_CACHE_DIR=$WORK/inductor
START=$SECONDS FAILED=0

# part NAME SECONDS COMMAND...: runs it with a limit, its output in a log
part() {
  local name=$1 limit=$2 begun=$SECONDS code
  shift 2
  [[ ,$ONLY, == *,${name%%-*},* ]] || return 0
  timeout --kill-after=10 "$limit" "$@" >"$LOGS/$name.log" 2>&1
  code=$?
  echo "$name: $([ $code = 0 ] && echo done || echo "FAILED ($code), see $LOGS/$name.log") after $((SECONDS - begun)) s, $((SECONDS - START)) s in all"
  if [ $code != 0 ]; then FAILED=$((FAILED + 1)); tail -n 5 "$LOGS/$name.log" | cut -c 1-300; fi
}

unpack() {  # wheels of modules that are not here
  for wheel in "$WHEELS"/*.whl; do
    top=$($PYTHON - "$wheel" <<'EOF'
import importlib.util, sys, zipfile
names = {n.split("/")[0].removesuffix(".py") for n in zipfile.ZipFile(sys.argv[1]).namelist() if ".dist-info" not in n and ".data/" not in n}
names = {n.split(".")[0] for n in names if n.split(".")[0].isidentifier()}
print("" if names and all(importlib.util.find_spec(n) for n in names) else "missing")
EOF
    )
    [ -z "$top" ] || $PYTHON -m pip install --quiet --no-deps --no-index --target "$WORK/site" "$wheel" || echo "cannot install $wheel"
  done
}
[ -z "$WHEELS" ] || unpack

if [ -z "$REHEARSE" ]; then
  $PYTHON -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "a GPU that torch can use is required and there is none; --rehearse tries the script on a CPU"; exit 78; }
  PICTURES=20000
else
  export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
  PICTURES=600
fi
personmae() { "$PYTHON" -m personmae "$@"; }
$PYTHON -m personmae doctor >"$LOGS/doctor.log" 2>&1
{ personmae synth "$WORK/data" --pool-images "$PICTURES" && personmae shards write "$WORK/data/pool" "$WORK/shards" --shard-mb 8; } >"$LOGS/shards.log" 2>&1 ||
  { echo "no shards: see $LOGS/shards.log"; exit 1; }
echo "shards of $PICTURES drawn people after $((SECONDS - START)) s"

if [ -z "$REHEARSE" ]; then
  part tests 120 $PYTHON -m pytest -q -m gpu -p no:cacheprovider tests
  part attention 40 $PYTHON benchmarks/attention.py --out "$OUT/attention.json"
  part regions 80 $PYTHON benchmarks/regions.py --sizes 256x128 --pictures full --out "$OUT/regions.json"
  part grid-base 80 $PYTHON -m personmae bench step --sizes base --batches 64,1024 --engines native --compile off,on,graph --steps 10 --rounds 2 --out "$OUT/grid-base.json"
  part grid-small 60 $PYTHON -m personmae bench step --sizes small --batches 64,1024 --engines native --compile off,on,graph --steps 10 --rounds 2 --out "$OUT/grid-small.json"
  part pipeline-base 50 $PYTHON -m personmae bench step --sizes base --batches 1024 --compile on --shards "$WORK/shards" --steps 15 --rounds 2 --out "$OUT/pipeline-base.json"
  part pipeline-small 50 $PYTHON -m personmae bench step --sizes small --batches 1024 --compile on --shards "$WORK/shards" --steps 20 --rounds 2 --out "$OUT/pipeline-small.json"
  part peers-base 60 $PYTHON benchmarks/peers/compare.py --shards "$WORK/shards" --size base --img-size 256 128 --batch-size 256 --compile --rounds 2 --steps 6 --out "$OUT/peers-base.json"
  part peers-small 60 $PYTHON benchmarks/peers/compare.py --shards "$WORK/shards" --size small --img-size 256 128 --batch-size 1024 --compile --rounds 2 --steps 6 --out "$OUT/peers-small.json"
  part curve 100 $PYTHON benchmarks/curve.py "$WORK/shards" --size small --img-size 256 128 --batch-size 256 --out "$OUT/curve.json"
  part deepspeed 60 $PYTHON -m personmae bench step --sizes base --batches 256 --engines "plain,native,deepspeed 1,fsdp" --compile off --steps 8 --rounds 2 --out "$OUT/engines.json"
else
  part tests 120 $PYTHON -m pytest -q -m gpu -p no:cacheprovider tests
  part attention 60 $PYTHON benchmarks/attention.py --batch-size 4 --sizes small --repeats 2 --out "$OUT/attention.json"
  part regions 60 $PYTHON benchmarks/regions.py --out "$OUT/regions.json"
  part grid 200 $PYTHON -m personmae bench step --sizes micro --batches 8 --img-size 128x64 --engines native --compile off --steps 2 --rounds 1 --out "$OUT/grid.json"
  part pipeline 100 $PYTHON -m personmae bench step --sizes micro --batches 32 --img-size 128x64 --shards "$WORK/shards" --steps 2 --rounds 1 --out "$OUT/pipeline.json"
  part peers 100 $PYTHON benchmarks/peers/compare.py --shards "$WORK/shards" --batch-size 16 --rounds 1 --steps 2 --out "$OUT/peers.json"
  part curve 150 $PYTHON benchmarks/curve.py "$WORK/shards" --batch-size 8 --steps 8 --eager --out "$OUT/curve.json"
  part deepspeed 100 $PYTHON -m personmae bench step --sizes micro --batches 8 --img-size 128x64 --engines "plain,native,deepspeed 1,fsdp" --steps 2 --rounds 1 --out "$OUT/engines.json"
fi
echo "$FAILED parts failed; $((SECONDS - START)) s in all; records in $OUT"
exit "$FAILED"
