#!/usr/bin/env bash
# The CUDA tests under compute-sanitizer: memcheck with every tensor in an allocation of its own, then racecheck.
# Usage: tests/sanitize_cuda.sh [FOLDER FOR LOGS] [TOOL ...]. PYTHON names the interpreter that radix_ops is installed for.
#
# Left out are tests that fault on purpose (device asserts), that read the profiler, capture graphs or need the host to
# run ahead of the device (which allow no checker or no allocation beside them), that compare times, and that need tens
# of gigabytes; of the guards over every op all but opcheck: gradcheck takes over 400 s and launches the kernels that
# opcheck and the function transforms launch. Random batches are fewer by RADIX_TEST_DIVISOR.
# racecheck leaves out what takes minutes and launches kernels that other tests launch: those of autograd and of bad
# input, and test_kernels of trie attention, of which the other tests in its file run the same kernels in under 3 minutes.
set -euo pipefail
tests=$(cd "$(dirname "$0")" && pwd)
logs=$(mkdir -p "${1:-sanitizer}" && cd "${1:-sanitizer}" && pwd)
tools=("${@:2}")
[ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck)
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 RADIX_TEST_DIVISOR="${RADIX_TEST_DIVISOR:-40}"
skip="not past_2_to and not few_launches and not device_asserts and not 2_to_the_28 and not very_different_widths and not copies_at_most and not copy_nothing and not capture and not one_wait and not current_stream and not take_no_longer"

check() { # tool, name of the log, pytest arguments
  local log=$logs/$1.$2.log
  compute-sanitizer --tool "$1" --target-processes all --error-exitcode 9 \
    "${PYTHON:-python3}" -m pytest -q -p no:cacheprovider -p no:xdist -m cuda "${@:3}" >"$log" 2>&1 || echo "FAILED: exit status $?" >>"$log"
}

for tool in "${tools[@]}"; do
  rm -f "$logs/$tool".*.log
  check "$tool" cuda "$tests/ops/test_cuda.py" "$tests/ops/test_cuda_results.py" "$tests/compat" -k "$skip" &
  check "$tool" gather "$tests/ops/test_gather.py" -k "$skip" &
  trie="$skip and not past_32_bits"
  [ "$tool" != racecheck ] || trie+=" and not test_kernels"
  check "$tool" trie "$tests/ops/test_trie.py" "$tests/ops/test_trie_kernels.py" -k "$trie" &
  check "$tool" scatter_add.sums "$tests/ops/test_scatter_add.py" -k "$skip and float64_sum" &
  check "$tool" scatter_add "$tests/ops/test_scatter_add.py" -k "$skip and not float64_sum" &
  check "$tool" fold "$tests/ops/test_fold.py" "$tests/ops/test_fold_collisions.py" "$tests/ops/test_fuzz.py" -k "$skip" &
  if [ "$tool" != racecheck ]; then
    every_op=$tests/ops/test_every_op.py autograd=$tests/ops/test_autograd.py
    check "$tool" opcheck "$every_op" -k "opcheck and not attention" &
    check "$tool" opcheck.attention "$every_op" "$autograd" -k "opcheck and attention" &
    check "$tool" autograd "$autograd" "$tests/ops/test_bad_input.py" "$tests/ops/test_bad_tensors.py" -k "$skip and not opcheck" &
  fi
  wait
done
cd "$logs"
status=0
for log in *.log; do
  summary=$(grep -hE "SUMMARY: |passed|^FAILED: " "$log" | sed 's/^=* //' | paste -sd' ')
  echo "$log: $summary"
  # Each of several processes has a summary; a log without a test that passed says nothing.
  if ! grep -qE "SUMMARY: 0 " "$log" || ! grep -qE "[1-9][0-9]* passed" "$log" ||
    grep -qE "SUMMARY: [1-9]|^FAILED: " "$log"; then
    status=1
  fi
done
exit $status
