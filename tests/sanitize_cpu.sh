#!/usr/bin/env bash
# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: the tests of the ops, then tests/ops/fuzz_ops.py.
# Usage: tests/sanitize_cpu.sh [SECONDS OF FUZZ [ITS OTHER ARGUMENTS]]. PYTHON names an interpreter with torch and the
# tests' requirements; SANITIZE_TESTS=0 leaves the tests out. The build stands in build/sanitize, beside links to the
# other files of the package.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(realpath -s "$(command -v "${PYTHON:-python3}")")
folder=$root/build/sanitize
tests="batch/test_by_hand.py $(printf 'ops/test_%s.py ' bad_input bad_tensors gather scatter_add trie trie_cpu trie_tables)"
mkdir -p "$folder/radix_ops"

# -fno-wrapv: overflow of signed integers is a finding. vptr would need a look into torch's own types.
mapfile -t torch_flags < <("$python" -c '
from torch.utils import cpp_extension as torch
print(*(f"-isystem{path}" for path in torch.include_paths()), *(f"-L{path}" for path in torch.library_paths()), sep="\n")')
printf '%s\n' -std=c++20 -O1 -g -fPIC -fvisibility=hidden -fno-omit-frame-pointer -fno-wrapv -D_GLIBCXX_ASSERTIONS \
  -fsanitize=address,undefined,float-cast-overflow -fno-sanitize=vptr -fno-sanitize-recover=all \
  -DTORCH_TARGET_VERSION=0x020b000000000000 "${torch_flags[@]}" >"$folder/flags"
cd "$folder"
newest_header=$(find "$root"/csrc/*.h "$root"/csrc/cpu/*.h -printf '%T@ %p\n' | sort -n | tail -1 | cut -d' ' -f2-)
for source in "$root"/csrc/*.cpp "$root"/csrc/cpu/*.cpp; do
  object=$(basename "$source" .cpp).o
  [[ $object -nt $source && $object -nt $newest_header ]] || printf '%s\n' "$source"
done | xargs -P "$(nproc)" -I{} sh -c 'g++ @flags -c "$1" -o "$(basename "$1" .cpp).o"' build {}
objects=$(basename -a -s .cpp "$root"/csrc/*.cpp "$root"/csrc/cpu/*.cpp | sed 's/$/.o/')
g++ @flags -shared $objects -o radix_ops/_C.abi3.so -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10
find radix_ops -type l -delete
for file in "$root"/radix_ops/*; do
  [[ $file == *.so || $file == */__pycache__ ]] || ln -sfn "$file" "$folder/radix_ops/"
done

# Python's own allocator would hide from ASan what it hands out; a tensor too large for memory is an error, as elsewhere.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" PYTHONMALLOC=malloc
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096
export UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 PYTHONPATH=$folder:$root/tests
cd "$root/tests"
if [ "${SANITIZE_TESTS:-1}" != 0 ]; then
  # Left out are tests that need more memory than ASan may hand out; the fuzz covers folds and plans.
  RADIX_TEST_DIVISOR=20 "$python" -m pytest -q -n "$(nproc)" -p no:cacheprovider \
    -m "not cuda" -k "not past_2_to and not memory_does_not_hold" $tests
fi
exec "$python" ops/fuzz_ops.py --seconds "${1:-20}" "${@:2}"
