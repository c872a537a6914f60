"""States as files: where ComfyUI finds them, and what a node says of one."""

from pathlib import Path

import folder_paths

from ...flowcache_core.models.latent_spaces import pixel_size
from ...flowcache_core.report import megabytes
from ...flowcache_core.storage.state import State

FOLDER = "flowcache_states"  # in the output folder, where they are saved, and in the input folder, for those of others


def register_folder() -> None:
    """Has ComfyUI list files of states."""
    roots = (folder_paths.get_output_directory(), folder_paths.get_input_directory())
    folders = [str(Path(root) / FOLDER) for root in roots]
    folder_paths.folder_names_and_paths.setdefault(FOLDER, (folders, {".safetensors"}))


def described(state: State) -> str:
    """Says what a state is of, in lines that fit a node's width."""
    width, height = pixel_size(state.latents.shape)
    tensors = [state.latents, *(part for history in state.histories for part in history)]
    return (
        f"{state.model or 'unknown model'}\n{width} x {height} pixels, {state.frames} latent frames, "
        f"{state.chunk_frames} a chunk\n{megabytes(sum(tensor.nbytes for tensor in tensors))}"
    )
