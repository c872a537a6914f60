"""What belongs to a MAGI-1 network but lies in files of its own: the autoencoder and the special tokens."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..errors import UserError
from ..models.magi.text import SpecialTokens
from ..models.magi.vae import MagiVae, MagiVaeConfig, load_vae
from ..storage.files import parse_json
from .weight_files import UPSTREAMS_FOLDERS, Progress, open_weights, write_safetensors

STAMP = "flowcache_magi_vae"  # metadata key: the autoencoder's config.json, in a file that `convert_vae` wrote
TOKENS_FILE = "special_tokens.npz"


def is_vae(path: str | Path) -> bool:
    """Tells whether a file or folder holds MAGI-1's autoencoder."""
    return {"encoder.cls_token", "decoder.cls_token"} <= open_weights(Path(path), mapped=False).tensors.keys()


def read_vae(path: str | Path) -> MagiVae:
    """Reads the autoencoder of a file or folder; its sizes are in the file's stamp, or in the config.json beside it.

    Raises:
        UserError: not MAGI-1's autoencoder, or nothing says its sizes.
    """
    tensors, settings = _vae(Path(path))
    return load_vae(tensors, MagiVaeConfig.from_upstream(settings))


def convert_vae(path: str | Path, out: str | Path, progress: Progress | None = None) -> None:
    """Writes the autoencoder as one safetensors file that needs no config.json.

    Raises:
        UserError: as for `read_vae`, or an output that cannot be written.
    """
    read_vae(path)
    tensors, settings = _vae(Path(path))
    write_safetensors(tensors, {"format": "pt", STAMP: json.dumps(settings)}, Path(out), progress=progress)


def find_tokens(path: str | Path, tensors: Mapping[str, Tensor]) -> SpecialTokens | None:
    """Finds a network's special tokens: in its own file, or in the special_tokens.npz beside it or beside upstream's
    inner folder; None if in neither."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    inner = [folder.parent] if folder.match(UPSTREAMS_FOLDERS) else sorted(folder.glob(UPSTREAMS_FOLDERS))
    inside = SpecialTokens.from_tensors(tensors)
    beside = [place / TOKENS_FILE for place in (folder, *inner) if (place / TOKENS_FILE).is_file()]
    return SpecialTokens.from_file(beside[0]) if inside is None and beside else inside


def _vae(path: Path) -> tuple[dict[str, Tensor], dict]:
    file = open_weights(path)
    try:
        settings = parse_json(file.metadata.get(STAMP, "{}"))
    except ValueError as error:
        raise UserError(f"{path.name} has a broken {STAMP!r} stamp; convert it again from its source.") from error
    settings = settings or file.settings
    if not settings or not isinstance(settings, dict):
        raise UserError(
            f"Nothing says the sizes of {path.name}: put the config.json of MAGI-1's vae folder beside it, or convert "
            "the folder with `python -m flowcache_core convert`."
        )
    return file.tensors, settings
