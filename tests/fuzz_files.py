"""Files from strangers: mutated files are read, and each must be taken or refused in one line.

As a script: python tests/fuzz_files.py --each 10000 --seed 0, with kinds behind it for some of them alone.
docs/reliability.md has what it printed last.
"""

import argparse
import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script has only its own folder there

from flowcache_core import checkpoints
from flowcache_core.checkpoints import magi_files  # noqa: E402
from flowcache_core.engine.loop import Chunk  # noqa: E402
from flowcache_core.errors import UserError  # noqa: E402
from flowcache_core.history.snapshot import Snapshot, SnapshotDelta  # noqa: E402
from flowcache_core.models.magi.config import MagiConfig  # noqa: E402
from flowcache_core.models.magi.network import MagiNetwork, load_network  # noqa: E402
from flowcache_core.models.magi.text import SpecialTokens  # noqa: E402
from flowcache_core.models.magi.vae import MagiVae, MagiVaeConfig  # noqa: E402
from flowcache_core.models.presets import quality_settings  # noqa: E402
from flowcache_core.models.wan import WanConfig, WanNetwork  # noqa: E402
from flowcache_core.reuse.calibration import Calibration, Measured  # noqa: E402
from flowcache_core.schedule import ChunkSchedule  # noqa: E402
from flowcache_core.storage.calibrations import load_calibration, save_calibration
from flowcache_core.storage.run_folder import RunFolder  # noqa: E402
from flowcache_core.storage.state import load_state, make_state, save_state  # noqa: E402

SECONDS = 5  # that one file may take
MEMORY = 300 * 2**20  # bytes that a whole run may grow by
TINY = WanConfig(dim=16, ffn_dim=8, num_heads=1, num_layers=1, in_dim=2, out_dim=2, text_dim=4, freq_dim=4)
MAGI = MagiConfig(
    layers=1, width=8, ffn_width=8, heads=2, kv_heads=1, head_dim=8, channels=2, caption_width=4, caption_tokens=4
)
HUGE = (2**31, 2**40, 2**62, 10**30, -1, 0, 1.5, "1", None, [], {}, True)
NAMES = (
    "../../etc/passwd",
    "/etc/passwd",
    "a/../../b",
    "",
    "\0",
    "x" * 5000,
    "blocks.99999999.norm3.weight",
    "..",
    7,
    None,
    ["a"],
)


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        make: writes a good one into a folder and gives the path to read and the one to mutate.
        read: the reader.
        mutate: changes the bytes of a good one.
        rearrange: puts other things into a good one's folder, instead.
    """

    make: Callable[[Path], tuple[Path, Path]]
    read: Callable[[Path], object]
    mutate: Callable[[bytes, random.Random], bytes]
    rearrange: Callable[[Path, random.Random], None] | None = None


@dataclass
class Outcome:
    """Attributes:
    taken, refused: how many files of each kind were.
    slowest: seconds that a file of each kind took at most.
    faults: the others: number of the file, kind, and what happened.
    """

    taken: Counter = field(default_factory=Counter)
    refused: Counter = field(default_factory=Counter)
    slowest: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


class TooSlow(BaseException):
    """A reader hangs."""


class Trap:
    """An object whose pickle runs code: it leaves a file behind."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def any_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut off, left out, doubled."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(max(1, min(len(content), rng.choice((16, 200, 10**9)))))
        end = at + rng.choice((1, 2, 8, 100))
        how = rng.randrange(5)
        if how == 0:
            content[at : at + 1] = bytes([rng.randrange(256)])
        elif how == 1:
            del content[at:]
        elif how == 2:
            del content[at:end]
        elif how == 3:
            content[at:at] = content[at:end]
        else:
            content[at : at + 8] = struct.pack("<q", rng.choice((0, 1, -1, 2**31, 2**62, rng.getrandbits(40))))
    return bytes(content)


def any_json(value, rng: random.Random):
    """A JSON value with one thing in it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        how = rng.randrange(6)
        if how == 0:
            return {name: inner for name, inner in value.items() if name != key}
        if how == 1:
            return {(str(rng.choice(NAMES)) if name == key else name): inner for name, inner in value.items()}
        return value | {key: any_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        return [*value[:at], any_json(value[at], rng), *value[at + 1 :]]
    if isinstance(value, str) and value.startswith("{") and rng.random() < 0.7:  # JSON inside of JSON
        return json.dumps(any_json(json.loads(value), rng))
    deep = "[" * rng.choice((1, 200_000))
    return rng.choice((*HUGE, *NAMES, value, deep))


def any_safetensors(content: bytes, rng: random.Random) -> bytes:
    """A change of the header's JSON half the time, of any bytes otherwise."""
    if rng.random() < 0.4:
        return any_bytes(content, rng)
    length = int.from_bytes(content[:8], "little")
    told = json.loads(content[8 : 8 + length])
    if "__metadata__" in told and rng.random() < 0.5:
        told["__metadata__"] = any_json(told["__metadata__"], rng)
    else:
        told = any_json(told, rng)
    header = json.dumps(told).encode()
    if rng.random() < 0.03:
        header = b'{"a":' + b"[" * 200_000
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def any_index(content: bytes, rng: random.Random) -> bytes:
    """A change of a JSON file."""
    return any_bytes(content, rng) if rng.random() < 0.2 else json.dumps(any_json(json.loads(content), rng)).encode()


def any_zip(content: bytes, rng: random.Random) -> bytes:
    """A change inside one of a zip's files half the time, of any bytes otherwise."""
    if rng.random() < 0.5:
        return any_bytes(content, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        changed = rng.choice(names)
        for name in names:
            inner = old.read(name)
            new.writestr(name, any_bytes(inner, rng) if name == changed else inner)
    return out.getvalue()


def any_folder(folder: Path, rng: random.Random) -> None:
    """Files swapped, copied, taken away, linked, or in their places folders, pipes, and links that lead nowhere."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    one, other = rng.choice(files), rng.choice(files)
    content, its = one.read_bytes(), other.read_bytes()
    how = rng.randrange(9)
    if how == 8:  # a number that is not its own
        name = one.name.replace("0000", rng.choice(("9999", "0010", "-001", "000")))
        one.rename(one.with_name(rng.choice((name, name.replace("chunk", "added"), name.replace("added", "history")))))
        return
    one.unlink()
    if how == 0:
        one.write_bytes(its)
        other.write_bytes(content)
    elif how == 1:
        one.symlink_to(rng.choice((other, one, folder / "nowhere", Path("/dev/zero"))))
    elif how == 2:
        one.mkdir()
    elif how == 3:
        os.mkfifo(one)
    elif how == 4:
        one.write_bytes(b"")
    elif how == 5:
        parent, away = one.parent, folder.parent / "away"
        one.write_bytes(content)
        shutil.rmtree(away, ignore_errors=True)
        parent.rename(away)
        parent.symlink_to(away, target_is_directory=True)
    elif how == 6:
        one.write_bytes(any_safetensors(content, rng))


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: tensor.detach().clone() for name, tensor in WanNetwork(TINY).state_dict().items()}


def make_checkpoint(folder: Path) -> tuple[Path, Path]:
    config = json.dumps({"transformer": {"num_heads": 1, "text_dim": 4, "causal_ar": True}})
    path = folder / "model.safetensors"
    save_file(weights(), path, metadata={"config": config, "flowcache": json.dumps({"family": "causal"})})
    return path, path


def make_magi(folder: Path) -> tuple[Path, Path]:
    path = folder / "magi.safetensors"
    save_file({name: tensor.clone() for name, tensor in MagiNetwork(MAGI).state_dict().items()}, path)
    return path, path


def make_magi_vae(folder: Path) -> tuple[Path, Path]:
    sizes = {
        "embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_ratio": 2, "z_chans": 2, "video_size": 16, "video_length": 4,
        "conv_last_layer": True, "qkv_bias": True,
    }  # fmt: skip
    settings = {"_class_name": "ViTVAE", "model_type": "vit", "ddconfig": sizes}
    path = folder / "vae.safetensors"
    vae = MagiVae(MagiVaeConfig.from_upstream(settings))
    stamp = {magi_files.STAMP: json.dumps(settings)}
    save_file({name: tensor.clone() for name, tensor in vae.state_dict().items()}, path, metadata=stamp)
    return path, path


def make_shards(folder: Path) -> tuple[Path, Path]:
    names = list(weights())
    first, second = names[: len(names) // 2], names[len(names) // 2 :]
    places = {}
    for number, part in enumerate((first, second)):
        save_file({name: weights()[name] for name in part}, folder / f"part-{number}.safetensors")
        places |= dict.fromkeys(part, f"part-{number}.safetensors")
    (folder / "config.json").write_text('{"num_heads": 1, "dim": 16}')
    index = folder / "model.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index, index


def make_config(folder: Path) -> tuple[Path, Path]:
    save_file(weights(), folder / "model.safetensors")
    config = folder / "config.json"
    told = {"dim": 16, "num_heads": 1, "inject_sample_info": False, "_class_name": "SkyReelsV2Transformer3DModel"}
    config.write_text(json.dumps(told))
    return folder, config


def make_torch(folder: Path) -> tuple[Path, Path]:
    path = folder / "model.pt"
    torch.save({"generator_ema": weights(), "step": 3}, path)
    (folder / "config.json").write_text('{"num_heads": 1, "dim": 16}')
    return folder, path


def make_trap(folder: Path) -> tuple[Path, Path]:
    path = folder / "model.pt"
    torch.save({"generator": weights(), "extra": Trap(folder.parent / "ran")}, path)
    return path, path


def make_old_trap(folder: Path) -> tuple[Path, Path]:
    path = folder / "model.pt"
    torch.save({"extra": Trap(folder.parent / "ran")}, path, _use_new_zipfile_serialization=False)
    return path, path


def make_saved_state(folder: Path) -> tuple[Path, Path]:
    path = folder / "state.safetensors"
    save_state(make_state(torch.randn(1, 2, 4, 2, 2), {"cond": clean(), "uncond": clean()}, 2, "model"), path)
    return path, path


def clean() -> Snapshot:
    keys, values = torch.randn(2, 1, 1, 1, 8, 4)
    tokens = torch.arange(8, dtype=torch.int32).expand(1, 1, 1, -1)
    return Snapshot(keys.clone(), values.clone(), tokens, torch.randn(1, 1, 1, 4, 4))


def make_tokens(folder: Path) -> tuple[Path, Path]:
    path = folder / "special_tokens.npz"
    rows = {"caption_token": (1, 8), "logo_token": (1, 8), "other_tokens": (20, 8)}
    np.savez(path, **{name: np.ones(shape, np.float16) for name, shape in rows.items()})
    return path, path


def make_token_trap(folder: Path) -> tuple[Path, Path]:
    path = folder / "special_tokens.npz"
    traps = np.array([Trap(folder.parent / "ran")], dtype=object)
    np.savez(path, caption_token=traps, logo_token=traps, other_tokens=traps)
    return path, path


def run_folder(root: Path) -> RunFolder:
    return RunFolder(root, "0" * 32, 2**30, first=0, chunk_frames=2)


def make_run(folder: Path) -> tuple[Path, Path]:
    kept = run_folder(folder)
    for index in range(2):
        keys = torch.randn(1, 1, 1, 4, 4)
        tokens = torch.arange(4 * index, 4 * index + 4, dtype=torch.int32).expand(1, 1, 1, -1)
        clean = Snapshot(keys, -keys, tokens, keys.new_empty(0))
        kept.add(Chunk(index, torch.randn(1, 2, 2, 4, 4)), SnapshotDelta({"0.0": clean}, full=index == 0))
    number = 1 if folder.name == "run's_addition" else 0
    kind = {"run": "history", "run's_chunk": "chunk", "run's_addition": "added"}.get(folder.name, "history")
    return folder, kept.path / f"{kind}-{number:05}.safetensors"


def read_run(root: Path) -> None:
    kept = run_folder(root)
    state = kept.load()
    for index in range(state.chunks if state else 0):
        kept.latent(index)
    if state is None:
        raise UserError("It starts anew.")


def make_calibration(folder: Path) -> tuple[Path, Path]:
    path = folder / "model.flowcache.json"
    curve = (Measured((0, 3, 6), 27.0), Measured((0, 2, 4, 6), 39.5))
    save_calibration(Calibration(8, 2, 4, 2, curve), path)
    return path, path


def read_calibration(path: Path) -> None:
    found = load_calibration(path)
    policy = quality_settings(0.5, found).reuse.policy(ChunkSchedule(4, 8, 2))
    assert 0 in policy.recomputed(8)


def load_checkpoint(path: Path) -> None:
    """Tells before it reads: the two have readers of their own."""
    told = checkpoints.inspect(path)
    assert told == checkpoints.load(path, check_finite=True)[0]


def load_magi(path: Path) -> None:
    info, tensors = checkpoints.load(path, check_finite=True)
    if info.family == "magi":
        load_network(tensors, distilled=False)


KINDS = {
    "checkpoint": Kind(make_checkpoint, load_checkpoint, any_safetensors),
    "MAGI-1": Kind(make_magi, load_magi, any_safetensors),
    "MAGI-1's VAE": Kind(make_magi_vae, magi_files.read_vae, any_safetensors),
    "shards": Kind(make_shards, load_checkpoint, any_index),
    "config": Kind(make_config, load_checkpoint, any_index),
    "torch file": Kind(make_torch, load_checkpoint, any_zip),
    "torch file with code": Kind(make_trap, load_checkpoint, any_zip),
    "old torch file with code": Kind(make_old_trap, load_checkpoint, any_bytes),
    "state": Kind(make_saved_state, load_state, any_safetensors),
    "run": Kind(make_run, read_run, any_safetensors),
    "run's chunk": Kind(make_run, read_run, any_safetensors),
    "run's addition": Kind(make_run, read_run, any_safetensors),
    "run's folder": Kind(make_run, read_run, any_safetensors, any_folder),
    "calibration": Kind(make_calibration, read_calibration, any_index),
    "special tokens": Kind(make_tokens, SpecialTokens.from_file, any_zip),
    "special tokens with code": Kind(make_token_trap, SpecialTokens.from_file, any_zip),
}


class Opened:
    """Notes every file that Python opens outside a folder while it is on; what is imported aside."""

    def __init__(self, folder: Path):
        self.folder, self.on, self.found = str(folder), False, []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        if (
            event == "open"
            and isinstance(args[0], str)
            and not args[0].startswith((self.folder, sys.prefix, sys.base_prefix))
        ):
            self.found.append(args[0])
        if event in ("os.system", "subprocess.Popen", "os.exec", "socket.connect"):
            self.found.append(event)


def fuzz(each: int, seed: int, folder: Path, kinds: Sequence[str] = tuple(KINDS)) -> Outcome:
    """Reads so many mutated files of each kind, in turn."""
    outcome, opened = Outcome(), Opened(folder)
    signal.signal(signal.SIGALRM, _too_slow)
    good = {}
    for name, kind in ((name, KINDS[name]) for name in kinds):
        place = folder / name.replace(" ", "_")
        place.mkdir()
        read, changed = kind.make(place)
        good[name] = (read, changed, changed.read_bytes())
        if "code" not in name:
            kind.read(read)
    memory = peak_memory()
    for number, name in itertools.product(range(each), kinds):
        kind, (path, changed, content) = KINDS[name], good[name]
        rng = random.Random(f"{seed} {name} {number}")
        if kind.rearrange is None:
            changed.write_bytes(kind.mutate(content, rng))
        else:
            shutil.rmtree(path)
            path.mkdir()
            kind.make(path)
            kind.rearrange(path, rng)
        fault = _read(kind, path, name, outcome, opened)
        if peak_memory() - memory > MEMORY:
            fault, memory = fault or f"memory grew by {peak_memory() - memory:,} bytes", peak_memory()
        if (folder / "ran").exists():
            fault = "it ran code"
            (folder / "ran").unlink()
        if opened.found:
            fault = f"it opened {opened.found}"
            opened.found = []
        if fault:
            outcome.faults.append(f"{name} {number} of seed {seed}: {fault}")
    return outcome


def _read(kind: Kind, path: Path, name: str, outcome: Outcome, opened: Opened) -> str | None:
    """Reads a file; what is wrong about how it went, if anything."""
    signal.alarm(SECONDS)
    opened.on, begun = True, time.perf_counter()
    try:
        kind.read(path)
        outcome.taken[name] += 1
    except UserError as error:
        outcome.refused[name] += 1
        if "\n" in str(error) or len(str(error)) > 1000:
            return f"not one short line: {str(error)[:200]!r}"
    except TooSlow:
        return f"longer than {SECONDS} s"
    except BaseException as error:  # a panic of a library in Rust is no Exception
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        opened.on = False
        signal.alarm(0)
        outcome.slowest[name] = max(outcome.slowest.get(name, 0.0), time.perf_counter() - begun)
    return None


def _too_slow(signum, frame):
    raise TooSlow


def peak_memory() -> int:
    """The most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", choices=[[], *KINDS], help="all of them where none is named")
    parser.add_argument("--each", type=int, default=10_000, help="files of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of torch, about tensors without elements
    kinds, begun = options.kinds or list(KINDS), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcome = fuzz(options.each, options.seed, Path(folder), kinds)
    for name in kinds:
        told = f"{outcome.taken[name]} taken, {outcome.refused[name]} refused, slowest {outcome.slowest[name]:.2f} s"
        print(f"{name}: {told}")
    files = options.each * len(kinds)
    print(f"{files:,} files in {time.perf_counter() - begun:.0f} s, {len(outcome.faults)} faults")
    print(*outcome.faults[:50], sep="\n")
    return bool(outcome.faults)


if __name__ == "__main__":
    sys.exit(main())
