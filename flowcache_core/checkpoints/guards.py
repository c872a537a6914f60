"""What is looked at before a stranger's file is read: what kind of file it is, and how much it may make us do."""

import pickletools
import zipfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from torch import Tensor

from ..errors import UserError
from ..storage.files import check_regular

LARGEST_PICKLE = 2**26  # bytes
MOST_OPCODES = 2**21  # of a pickle; ten thousand tensors take some 400,000
MOST_TENSORS = 2**16  # of a file; large models have some thousands


def check_kind(path: Path) -> None:
    """Raises UserError for what is no regular file: a pipe or a device may never end."""
    try:
        check_regular(path)
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror or error}); give the weights' file.") from error


def check_pickle(path: Path) -> None:
    """Looks at the pickle of a torch file, without running it.

    Raises:
        ValueError: it is missing, packed, or longer than one of plain tensors would be.
        zipfile.BadZipFile: the file is no zip.
    """
    with zipfile.ZipFile(path) as file:
        entries = file.infolist()
        pickles = [entry for entry in entries if entry.filename.split("/")[-1] == "data.pkl"]
        if len(pickles) != 1 or len(entries) > MOST_TENSORS:
            raise ValueError(f"it has {len(entries):,} entries, {len(pickles)} of them data.pkl")
        if pickles[0].compress_type != zipfile.ZIP_STORED or pickles[0].file_size > LARGEST_PICKLE:
            raise ValueError(f"its pickle is packed, or its {pickles[0].file_size:,} bytes are too many")
        content = file.read(pickles[0])
    if next(islice(pickletools.genops(content), MOST_OPCODES, None), None) is not None:
        raise ValueError(f"its pickle has more than {MOST_OPCODES:,} opcodes")


def check_count(path: Path, tensors: int) -> None:
    """Raises UserError where a file names more tensors than any model has."""
    if tensors > MOST_TENSORS:
        raise UserError(
            f"{path.name} names {tensors:,} tensors, expected at most {MOST_TENSORS:,}; give a model's file."
        )


def check_claims(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError where a tensor has more numbers than its part of the file holds."""
    for name, tensor in tensors.items():
        held = tensor.untyped_storage().nbytes()
        if tensor.numel() * tensor.itemsize > held:
            raise UserError(
                f"{path.name} has {name!s:.100} of shape {list(tensor.shape)}, and {held:,} bytes for it; download it "
                f"again."
            )
