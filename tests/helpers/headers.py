"""Stand-ins for published files: their names, shapes and types, and no weights; lists and sources in tests/headers."""

import json
import re
from pathlib import Path

import torch

from tests.helpers.paths import ROOT

Header = dict[str, tuple[str, list[int]]]  # a tensor's name: its type as safetensors writes it, its shape
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}


def stored(name: str) -> tuple[Header, dict]:
    """A list of tests/headers with its layers spelt out, and the config.json that its class writes."""
    held = json.loads((ROOT / "tests" / "headers" / f"{name}.json").read_text())
    header: Header = {}
    for pattern, (kind, shape) in held["tensors"].items():
        numbers = re.search(r"{([\d,-]+)}", pattern)
        for part in numbers[1].split(",") if numbers else ():
            first, _, last = part.partition("-")
            for layer in range(int(first), int(last or first) + 1):
                header[pattern.replace(numbers[0], str(layer))] = kind, shape
        if not numbers:
            header[pattern] = kind, shape
    return header, held.get("config", {})


def write_safetensors(path: Path, header: Header, metadata: dict[str, str] | None = None) -> None:
    """Writes a file of the real size that takes next to no room."""
    entries: dict[str, dict] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (kind, shape) in header.items():
        begin, end = end, end + TYPES[kind].itemsize * torch.Size(shape).numel()
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + end)


def write_shards(folder: Path, stem: str, count: int, header: Header) -> None:
    names = list(header)
    for number in range(count):
        part = {name: header[name] for name in names[number::count]}
        write_safetensors(folder / f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors", part)


def write_torch(path: Path, header: Header, prefixes: dict[str, str]) -> None:
    """Writes a torch file whose tensors repeat one number. `prefixes`: what its entries put before every name."""
    zero = torch.zeros(())
    torch.save(
        {entry: {f"{p}{n}": zero.expand(s) for n, (_, s) in header.items()} for entry, p in prefixes.items()}, path
    )
