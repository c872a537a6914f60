"""Reading and writing files of weights: safetensors, shards of them, and torch's zip format.

Weights are mapped, not copied: a tensor takes memory when it is used, and gives it back. Files are told apart by their
first bytes, never by their names, and nothing is ever unpickled except by torch's weights-only reader.
"""

import importlib
import json
import math
import re
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError, first_line
from ..storage.files import LARGEST_HEADER, parse_json, read_json_text, write_whole
from .guards import check_claims, check_count, check_kind, check_pickle

Progress = Callable[[int, int], None]  # bytes written, bytes in all

NAMES = {  # in safetensors 0.8; torch 2.5 does not have them all
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0", "float4_e2m1fn_x2": "F4",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
DTYPE_NAMES = {getattr(torch, name): code for name, code in NAMES.items() if hasattr(torch, name)}
DTYPES = {code: dtype for dtype, code in DTYPE_NAMES.items()}
FLOAT4 = getattr(torch, "float4_e2m1fn_x2", None)  # two numbers in a byte, which a header counts apart

UPSTREAMS_FOLDERS = "inference_weight*"  # in which MAGI-1's loader looks for weights
ZSTD = ("compression.zstd", "zstandard")  # the one of Python 3.14, or the package

SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})(\.\w+)")
CONTROL_PREFIX = re.compile(r"^pipe\.(dual_controller|dit)\.")  # as LongVie's trainer may leave it
CONTROL_LAYERS = re.compile(r"^(pipe\.dual_controller\.)?control_\w+\.")
ATTENTION = re.compile(r"^(pipe\.dit\.)?blocks\.\d+\.self_attn\.\w+\.")
LONGEST_NAME = 200  # of a shard's file


@dataclass(frozen=True)
class WeightFile:
    """What a file or a set of shards holds.

    Attributes:
        tensors: names to mapped tensors.
        metadata: the safetensors metadata; empty for torch files.
        bytes: size on disk, of all shards.
        wrapper: the entry of a torch file that the tensors were under ("generator_ema", …), or "".
        settings: what the config.json of their folder says; it may be of another model.
        folder: name of the folder that they lie in.
        notes: one line each, for the user, on what was chosen of several.
        parts: of LongVie's files in their folder, under Wan 2.1's and LongVie's names; they go over the network's own.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    bytes: int
    wrapper: str = ""
    settings: dict = field(default_factory=dict)
    folder: str = ""
    notes: tuple[str, ...] = ()
    parts: dict[str, Tensor] = field(default_factory=dict)


def open_weights(path: Path, use_ema: bool = True, mapped: bool = True) -> WeightFile:
    """Opens a safetensors file, a torch file, an index.json with its shards, a folder that holds one of them, or
    diffusers' folder of a pipeline. A shard stands for all of them, which an index beside it names, or its own number
    of so many. One that is there as .zst only is unpacked beside it, once, where a package for that is installed.

    Args:
        use_ema: of a torch file that has both, take "generator_ema" rather than "generator".
        mapped: False reads names, shapes and types alone, and gives tensors on the meta device. Safetensors' own reader
            maps the whole file, which a system may refuse, and has it read ahead.

    Raises:
        UserError: the file is missing, cut short, or of another kind.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; check the path.")
    file, notes, beside = _only_model(path) if path.is_dir() else (path, (), [])
    file = _index_of(file)
    several = file.suffix == ".json" or SHARD.fullmatch(file.name)
    if file.suffix == ".json":
        check_kind(file)
    held = (_open_shards if several else _open_file)(file, use_ema, mapped)
    try:
        settings = folder_settings(file.parent)
    except UserError:
        if several or path.is_dir():
            raise
        settings = {}  # of another model, most likely
    opened = [_open_file(part, use_ema, mapped) for part in beside]
    parts = {CONTROL_PREFIX.sub("", name): tensor for one in opened for name, tensor in one.tensors.items()}
    size = held.bytes + sum(one.bytes for one in opened)
    return replace(held, bytes=size, settings=settings, folder=file.absolute().parent.name, notes=notes, parts=parts)


def longvie_parts(folder: Path) -> list[Path]:
    """Finds what goes over a network in a folder: files of LongVie's control layers and of its attention layers, and
    nothing else. Without control layers there are no parts."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        names: list[str] = []
        if not SHARD.fullmatch(file.name):
            with suppress(UserError):
                names = list(_checked_header(file, _first_bytes(file), file.stat().st_size))
        names = [name for name in names if name != "__metadata__"]
        if names and all(CONTROL_LAYERS.search(name) for name in names):
            found["control"] = file
        elif names and all(ATTENTION.search(name) for name in names):
            found["attention"] = file
    return list(found.values()) if "control" in found else []


def write_safetensors(
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    out: Path,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    changed: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> None:
    """Writes one safetensors file, tensor by tensor, under another name until it is whole.

    Args:
        dtype: of the floating-point matrices in the file; None leaves them as they are.
        changed: gives what is written of a tensor, from its name, alike in shape and type.

    Raises:
        UserError: `out` exists, is no .safetensors, or its folder cannot be written to or is full; or a tensor goes
            beyond what the type holds, by name.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"The output is called {out.name}; ComfyUI reads it only as .safetensors: rename it.")
    if out.exists():
        raise UserError(f"{out} exists already; choose another name or delete it.")
    header, total = _header(tensors, metadata, dtype)

    def write(partial: Path) -> None:
        free = shutil.disk_usage(partial.parent).free
        if free < total + len(header):
            raise UserError(f"{out.parent} has {free:,} bytes free, the file needs {total + len(header):,}; make room.")
        written = 0
        with open(partial, "wb") as file:
            file.write(header)
            for name, tensor in tensors.items():
                kind, tensor = _written_dtype(tensor, dtype), changed(name, tensor)
                _check_range(name, tensor, kind)
                data = tensor.detach().to("cpu", kind).contiguous().flatten().view(torch.uint8)
                file.write(data.numpy().data)
                written += data.numel()
                if progress:
                    progress(written, total)

    write_whole(out, write)


def _first_bytes(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(64)
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}); check its permissions.") from error


def folder_settings(folder: Path) -> dict:
    """Reads what the config.json in a folder says; {} without one."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        settings = parse_json(read_json_text(file))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); download it again.") from error
    return settings if isinstance(settings, dict) else {}


def _only_model(folder: Path) -> tuple[Path, tuple[str, ...], list[Path]]:
    """The index of a folder's shards, or its only file of weights, what the user should know of the choice, and what
    goes over the network."""
    notes: tuple[str, ...] = ()
    if (folder / "model_index.json").is_file():
        if (folder / "transformer_2").is_dir():
            notes = (f"{folder.name} has two networks; transformer is taken, transformer_2 is left out.",)
        folder = folder / "transformer"
    parts = longvie_parts(folder)
    for pattern in ("*safetensors.index*.json", "*.index*.json", "*.safetensors", "*.bin", "*.pt"):
        found = sorted(set(folder.glob(pattern)).difference(parts), key=lambda file: len(file.name))
        if not found:
            continue
        plain, *others = found
        if all(SHARD.fullmatch(file.name) for file in found):
            return plain, notes, parts
        if all(file.name.startswith(f"{plain.stem}.") for file in others):  # as in model.fp16.safetensors
            if others:
                notes = (*notes, f"{plain.name} is taken, {others[0].name} beside it is left out.")
            return plain, notes, parts
        names = ", ".join(sorted(file.name for file in found)[:4])
        raise UserError(f"{folder} holds {len(found)} files {pattern} ({names}), expected one; name the file itself.")
    inner = sorted(folder.glob(UPSTREAMS_FOLDERS))
    if len(inner) == 1 and inner[0].is_dir():
        return _only_model(inner[0])
    if inner:
        raise UserError(f"{folder} holds {', '.join(one.name for one in inner)}, expected one of them; name it itself.")
    raise UserError(f"{folder} holds no .safetensors, index.json, .bin or .pt; give the folder or file of the weights.")


def _index_of(path: Path) -> Path:
    """The index that names a file as one of its shards; the file itself where there is none."""
    for index in sorted(path.parent.glob("*.index*.json")) if path.suffix in (".safetensors", ".bin") else ():
        with suppress(ValueError):
            if json.dumps(path.name) in read_json_text(index):
                return index
    return path


def _open_file(path: Path, use_ema: bool, mapped: bool) -> WeightFile:
    check_kind(path)
    if _first_bytes(path).startswith(b"PK\x03\x04"):
        return _open_torch(path, use_ema, mapped)
    return _open_safetensors(path, mapped)


def _open_safetensors(path: Path, mapped: bool) -> WeightFile:
    size = path.stat().st_size
    header = _checked_header(path, _first_bytes(path), size)
    if not mapped:
        return _told(path, header, size)
    try:
        with safe_open(path, framework="pt") as file:
            return WeightFile({name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}, size)
    except (SafetensorError, ValueError, TypeError, AttributeError) as error:
        reason = first_line(error)
        raise UserError(f"{path.name} cannot be read ({reason}); download it again, or one of another type.") from error
    except RuntimeError as error:  # of torch
        raise UserError(
            f"{path.name} cannot be mapped ({first_line(error)}); its {size:,} bytes need as much memory or swap: use "
            "shards, or a smaller type."
        ) from error


def _told(path: Path, header: dict, size: int) -> WeightFile:
    """What a header says of the tensors, without them."""
    metadata = header.pop("__metadata__", {})
    try:
        tensors = {}
        for name, entry in header.items():
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            shape = [*shape[:-1], shape[-1] // 2] if dtype == FLOAT4 else shape
            tensors[name] = torch.empty(shape, dtype=dtype, device="meta")
        if not all(isinstance(word, str) for pair in metadata.items() for word in pair):
            raise TypeError("metadata that is no text")
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        raise UserError(
            f"{path.name} has a header that cannot be read ({first_line(error)}); download it again, or one of another "
            "type."
        ) from error
    return WeightFile(tensors, metadata, size)


def _checked_header(path: Path, start: bytes, size: int) -> dict:
    """The header of a whole safetensors file; says what the file is when it is none."""
    kinds = {
        b"GGUF": "a GGUF file; load it with ComfyUI-GGUF's own loader node",
        b"\x80": "a pickle, which can run code when it is opened, so it is not; ask for a safetensors file",
        b"version https://git-lfs": "a Git LFS pointer, not the weights; fetch them with `git lfs pull`",
        b"<": "a web page, not weights; download the file itself",
    }
    length = int.from_bytes(start[:8], "little")
    begins_well = start[8:9] == b"{" and 2 <= length <= LARGEST_HEADER  # a length's first byte may be any magic's
    for magic, kind in kinds.items():
        if start.startswith(magic) and not begins_well:
            raise UserError(f"{path.name} is {kind} (expected safetensors).")
    if size < 10:
        raise UserError(f"{path.name} has {size} bytes, expected a safetensors file; download it again.")
    if not begins_well:
        raise UserError(
            f"{path.name} does not begin like a safetensors file, which is expected; give the weights' file."
        )
    short = f"{path.name} is cut short: it has {size:,} bytes, its header promises {{:,}}; download it again."
    if 8 + length > size:
        raise UserError(short.format(8 + length))
    with open(path, "rb") as file:
        file.seek(8)
        try:
            header = parse_json(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(f"{path.name} has a broken safetensors header; download it again.") from error
    if expected > size:
        raise UserError(short.format(expected))
    check_count(path, len(header))
    return header


def _open_shards(index: Path, use_ema: bool, mapped: bool) -> WeightFile:
    """Opens all shards that an index names, or that go with one of them by their numbers."""
    places: dict[str, str] = {}
    numbers = SHARD.fullmatch(index.name)
    if numbers:
        front, count, end = numbers.groups()
        shards = [f"{front}-{number:05d}-of-{count}{end}" for number in range(1, int(count) + 1)]
    else:
        try:
            places = parse_json(read_json_text(index))["weight_map"]
            shards = sorted(set(places.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index.name} has no weight_map, expected an index of shards; check the file.") from error
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    size = 0
    for name in shards:
        if not isinstance(name, str) or not _is_plain(name) or len(name) > LONGEST_NAME:
            raise UserError(
                f"{index.name} names the shard {name!r}, expected a file beside it; download the index again."
            )
        shard = index.parent / name
        if not shard.is_file() and Path(f"{shard}.zst").is_file():
            _unpack(shard)
        if not shard.is_file():
            raise UserError(
                f"{index.name} goes with {name}, which is not beside it: one shard of several; put all {len(shards)} "
                f"in {index.parent}."
            )
        held = _open_file(shard, use_ema, mapped)
        tensors |= held.tensors
        metadata |= held.metadata
        size += held.bytes
    lost = sorted(places.keys() - tensors.keys())
    if lost:
        raise UserError(f"{index.name} promises {lost[0]} and {len(lost) - 1} more that no shard holds; download them.")
    return WeightFile(tensors, metadata, size)


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file beside, on every system."""
    return PurePosixPath(name).name == PureWindowsPath(name).name == name


def _unpack(shard: Path) -> None:
    """Writes a shard out of its .zst beside it: weights are mapped, and packed ones cannot be."""
    packed = Path(f"{shard}.zst")
    for name in ZSTD:
        try:
            zstd = importlib.import_module(name)
            break
        except ImportError:
            continue
    else:
        raise UserError(f"{packed.name} is packed, and no package unpacks it: install zstandard, or run `zstd -d`.")
    with zstd.open(packed, "rb") as source:

        def write(partial: Path) -> None:
            with open(partial, "wb") as file:
                shutil.copyfileobj(source, file, 1 << 24)
            _checked_header(partial, _first_bytes(partial), partial.stat().st_size)  # zstandard ends early in silence

        try:
            write_whole(shard, write)
        except (EOFError, zstd.ZstdError) as error:
            raise UserError(f"{packed.name} does not unpack ({first_line(error)}); download it again.") from error


def _open_torch(path: Path, use_ema: bool, mapped: bool) -> WeightFile:
    try:
        check_pickle(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # read-only maps; nothing here writes into them
            content = torch.load(path, map_location="cpu" if mapped else "meta", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for what it will not read
        raise UserError(
            f"{path.name} is a zip but no torch file of plain tensors ({first_line(error)}); it may be cut short or "
            "hold code: download it again or ask for a safetensors file."
        ) from error
    order = ("generator_ema", "generator") if use_ema else ("generator", "generator_ema")
    wrapper = ""
    for name in (*order, "generator_lora", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content, wrapper = content[name], name
            break
    if not isinstance(content, dict):
        raise UserError(
            f"{path.name} holds a {type(content).__name__}, expected named tensors; give a checkpoint's file."
        )
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        entries = ", ".join(map(str, list(content)[:4])) or "nothing"
        raise UserError(f"{path.name} holds {entries}, expected named tensors; give a checkpoint's file.")
    check_count(path, len(tensors))
    if mapped:
        check_claims(path, tensors)
    return WeightFile(tensors, {}, path.stat().st_size, wrapper)


def _written_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() and tensor.ndim > 1 else tensor.dtype


def _check_range(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if dtype == tensor.dtype or torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max:
        return
    largest = max(
        (float(piece.float().abs().max()) for piece in tensor.flatten().split(1 << 20) if piece.numel()), default=0
    )
    if largest > torch.finfo(dtype).max:
        raise UserError(
            f"{name} goes up to {largest:g}, and {dtype} holds {torch.finfo(dtype).max:g} at most; choose bfloat16 or "
            "leave the type unchanged."
        )


def _header(tensors: dict[str, Tensor], metadata: dict[str, str], dtype: torch.dtype | None) -> tuple[bytes, int]:
    """A safetensors header with its length in front, and the bytes of data that follow."""
    entries: dict[str, dict] = {"__metadata__": metadata}
    offset = 0
    for name, tensor in tensors.items():
        kind = _written_dtype(tensor, dtype)
        if kind not in DTYPE_NAMES:
            raise UserError(f"{name} is of {kind}, which safetensors does not hold; use a file of another type.")
        end = offset + kind.itemsize * math.prod(tensor.shape)
        shape = [*tensor.shape[:-1], 2 * tensor.shape[-1]] if kind == FLOAT4 else list(tensor.shape)
        entries[name] = {"dtype": DTYPE_NAMES[kind], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    return len(text).to_bytes(8, "little") + text, offset
