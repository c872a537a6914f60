#!/usr/bin/env bash
# torch 2.13.0: the FLOP counter ends with a TypeError on torch.bmm, addmm and baddbmm with out_dtype; it counts torch.mm.
#
# Guessed: out_dtype changes the type of the result alone, so products are counted as they are without it: 240 for two
# of 3x4 by 4x5, 120 for one.
# Seen: mm gives 120. bmm raises "bmm_flop() got multiple values for argument 'out_shape'": its formula takes the dtype,
# a positional argument, for the result's shape; so does addmm's, and baddbmm's takes it for a factor. A way out: call
# the formulas of torch.utils.flop_counter.flop_registry without dtypes.
#
# Seen on 2026-11-27:
#   bmm 240
#   mm with out_dtype 120
#   bmm with out_dtype TypeError
#   addmm with out_dtype TypeError
#   baddbmm with out_dtype TypeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.4
seen=$("$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.utils.flop_counter import FlopCounterMode

a = torch.empty(2, 3, 4, dtype=torch.bfloat16, device="meta")
b = torch.empty(2, 4, 5, dtype=torch.bfloat16, device="meta")
c = torch.empty(2, 3, 5, device="meta")
products = {
    "bmm": lambda: torch.bmm(a, b),
    "mm with out_dtype": lambda: torch.mm(a[0], b[0], out_dtype=torch.float32),
    "bmm with out_dtype": lambda: torch.bmm(a, b, out_dtype=torch.float32),
    "addmm with out_dtype": lambda: torch.addmm(c[0], a[0], b[0], out_dtype=torch.float32),
    "baddbmm with out_dtype": lambda: torch.baddbmm(c, a, b, out_dtype=torch.float32),
}
for name, product in products.items():
    try:
        with FlopCounterMode(display=False) as counter:
            product()
        print(name, counter.get_total_flops())
    except TypeError as error:
        print(name, type(error).__name__)
PYTHON
)
expected="bmm 240
mm with out_dtype 120
bmm with out_dtype TypeError
addmm with out_dtype TypeError
baddbmm with out_dtype TypeError"
echo "$seen"
if [ "$seen" != "$expected" ]; then
    echo "This has changed; expected:"
    echo "$expected"
    exit 1
fi
