#!/usr/bin/env bash
# Runs the tests under the conditions of other machines, one setting after another; lists failures.
#
#     tests/machines.sh             every setting, the quick tests: some two hours on two cores
#     tests/machines.sh avx2 load   these settings alone (the names below)
#     SLOW=1 tests/machines.sh ...  with the slow tests
#
# It needs an installation for development (pip install -e ".[dev]"); `torch` makes a virtual
# environment of its own, with OTHER_TORCH (2.9.1 unless it is set). Logs stay in LOGS
# (machines-logs). A setting that changes nothing on this processor is no failure.
set -uo pipefail
cd "$(dirname "$0")/.."

LOGS=${LOGS:-machines-logs}
OTHER_TORCH=${OTHER_TORCH:-2.9.1}
mkdir -p "$LOGS"
failed=()

# The tests of computations; the others do not depend on the processor.
NUMBERS=(tests/test_c*.py tests/test_gpu_backends.py tests/test_similarity.py tests/test_losses.py
  tests/test_plans.py tests/test_ops_library.py tests/test_models_*.py tests/test_train_*.py
  tests/test_tolerance.py tests/test_triton_interpreter.py tests/test_bench_loss.py)
OPTIONS=(${SLOW:+--slow} --margins -p no:cacheprovider)

# setting NAME [VARIABLE=VALUE ...]: pytest on WHAT in that environment.
setting() {
  local name=$1 started=$SECONDS
  shift
  if env "$@" python -m pytest "${OPTIONS[@]}" "${WHAT[@]}" > "$LOGS/$name.txt" 2>&1; then
    echo "passed  $name  ($((SECONDS - started)) s)  $(tail -1 "$LOGS/$name.txt")"
  else
    failed+=("$name")
    echo "FAILED  $name  ($((SECONDS - started)) s): $LOGS/$name.txt"
    grep -E "^(FAILED|ERROR)" "$LOGS/$name.txt" | head -20
  fi
}

WHAT=("${NUMBERS[@]}")

# Instruction sets of torch's own kernels, oneDNN, MKL, and (CKD_TEST_TIERS) csrc/cpu.
run_default() {
  setting default ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 \
    MKL_ENABLE_INSTRUCTIONS=SSE4_2 CKD_TEST_TIERS=portable
}
run_avx2() {
  setting avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
    CKD_TEST_TIERS=avx2,portable
}
run_avx512() {
  setting avx512 ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE \
    MKL_ENABLE_INSTRUCTIONS=AVX512 CKD_TEST_TIERS=avx512,avx2,portable
}
# Each tier as the best one available.
run_tiers() {
  for tier in $(python -c "from ckd.backends import cpu; print(*cpu.TIERS)"); do
    setting "tier-$tier" "CKD_TEST_TIERS=$tier,portable"
  done
}
run_threads() {
  for count in 1 2 3; do setting "threads-$count" "OMP_NUM_THREADS=$count"; done
}
# Beside two busy processes.
run_load() {
  local pids=()
  for _ in 1 2; do
    (while :; do :; done) &
    pids+=($!)
  done
  WHAT=()
  setting load
  WHAT=("${NUMBERS[@]}")
  kill "${pids[@]}"
  wait "${pids[@]}" 2> /dev/null
}
# Other orders of hash sets, files and tests.
run_order() {
  WHAT=()
  for seed in 1 2; do setting "order-$seed" "PYTHONHASHSEED=$seed" "CKD_TEST_ORDER=$seed"; done
  WHAT=("${NUMBERS[@]}")
}
# The same build of ckd with another torch, in a virtual environment of its own.
run_torch() {
  local place
  place=$(mktemp -d)
  python3 -m venv "$place"
  if "$place/bin/pip" install -q "torch==$OTHER_TORCH" &&
    "$place/bin/pip" install -q -e ".[dev]"; then
    PATH="$place/bin:$PATH" setting "torch-$OTHER_TORCH"
  else
    failed+=(torch)
    echo "FAILED  torch: it does not install"
  fi
  rm -rf "$place"
}

for name in "${@:-default avx2 avx512 tiers threads load order torch}"; do
  for one in $name; do "run_$one"; done
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all passed"
