#!/usr/bin/env bash
# safetensors 0.8.0 with torch 2.13.0: what load_file returned changes when the file is later overwritten in place.
#
# Guessed: load_file is done with the file once it returns, as torch.load is, so a later write to the file is seen only
# by those who load it again.
# Seen: the tensors are a private mapping of the file. Bytes that are written to it later show in the tensors, until the
# program writes to the tensor, one element being enough for all that lies near it: from there on they stay. What
# safetensors.numpy.load_file, torch.load and safetensors.torch.load (of the file's bytes) return stays as it was. A way
# out: write a new file and os.replace() the old one, or clone() what was loaded.
#
# Seen on 2026-11-27: [0, 1, 2, 3] was loaded, then 7 was written over each in the file
#   torch.load [0.0, 1.0, 2.0, 3.0]
#   safetensors.numpy.load_file [0.0, 1.0, 2.0, 3.0]
#   safetensors.torch.load [0.0, 1.0, 2.0, 3.0]
#   safetensors.torch.load_file [7.0, 7.0, 7.0, 7.0]
#   the same, after tensor[0] = 5 [5.0, 1.0, 2.0, 3.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile safetensors==0.8.0 torch==2.13.0 numpy==2.3.4
seen=$("$folder/venv/bin/python" - "$folder/weights" <<'PYTHON'
import sys

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch

path = sys.argv[1]
before = np.array([0, 1, 2, 3], np.float32)
after = np.array([7, 7, 7, 7], np.float32)


def loaded_from_bytes():
    with open(path, "rb") as file:
        return safetensors.torch.load(file.read())


def loaded_and_changed():
    tensors = safetensors.torch.load_file(path)
    tensors["a"][0] = 5
    return tensors


for name, save, load in (
    ("torch.load", torch.save, lambda: torch.load(path)),
    ("safetensors.numpy.load_file", safetensors.torch.save_file, lambda: safetensors.numpy.load_file(path)),
    ("safetensors.torch.load", safetensors.torch.save_file, loaded_from_bytes),
    ("safetensors.torch.load_file", safetensors.torch.save_file, lambda: safetensors.torch.load_file(path)),
    ("the same, after tensor[0] = 5", safetensors.torch.save_file, loaded_and_changed),
):
    save({"a": torch.from_numpy(before)}, path)
    tensors = load()
    with open(path, "r+b") as file:
        file.seek(file.read().index(before.tobytes()))
        file.write(after.tobytes())
    print(name, tensors["a"].tolist())
PYTHON
)
expected="torch.load [0.0, 1.0, 2.0, 3.0]
safetensors.numpy.load_file [0.0, 1.0, 2.0, 3.0]
safetensors.torch.load [0.0, 1.0, 2.0, 3.0]
safetensors.torch.load_file [7.0, 7.0, 7.0, 7.0]
the same, after tensor[0] = 5 [5.0, 1.0, 2.0, 3.0]"
echo "$seen"
if [ "$seen" != "$expected" ]; then
    echo "This has changed; expected:"
    echo "$expected"
    exit 1
fi
