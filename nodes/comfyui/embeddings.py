"""A prompt's embedding as a file, for the command line, which has no text encoder."""

import torch
from safetensors.torch import save_file

from ...flowcache_core.errors import UserError
from ...flowcache_core.storage.files import write_whole
from .captions import BLEND, CHUNKS
from .stream import OutputFile

FOLDER = "flowcache_embeddings"  # of the host's output folder


def save_embedding(conditioning: list, prefix: str) -> tuple[OutputFile, str]:
    """Writes a condition of the host's; gives the file and a line on it.

    Raises:
        UserError: several prompts, or one that does not hold for a whole video.
    """
    if len(conditioning) != 1:
        raise UserError(f"There are {len(conditioning)} prompts in the conditioning, expected 1; save each by itself.")
    embedding, more = conditioning[0]
    if CHUNKS in more or BLEND in more:
        raise UserError("Prompts over Time gives several prompts; save each of them before that node.")
    tensors = {"embedding": embedding.detach().cpu().contiguous()}
    if more.get("attention_mask") is not None:
        tensors["mask"] = (
            more["attention_mask"].detach().cpu().to(torch.int32).reshape(embedding.shape[:2]).contiguous()
        )
    file = OutputFile.new(f"{FOLDER}/{prefix}", (1, 1), ".safetensors")
    try:
        write_whole(file.path, lambda partial: save_file(tensors, partial))
    finally:
        file.drop_empty()
    return file, f"{file.name}\n{embedding.shape[1]} tokens of width {embedding.shape[2]}"
