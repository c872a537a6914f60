"""The host's folders of models."""

from pathlib import Path

import folder_paths

# In a folder that is a model as a whole: diffusers' and upstreams' settings, an index of shards, MAGI-1's own folders,
# LongVie's control layers.
MARKS = ("model_index.json", "config.json", "*.index*.json", "inference_weight*", "control.safetensors")


def file_names(folder: str) -> list[str]:
    """Lists the files of a folder such as "vae", as the page offers them."""
    return folder_paths.get_filename_list(folder)


def model_folders(folder: str) -> list[str]:
    """Lists the folders in a folder such as "diffusion_models" that each hold one model, in one file or several."""
    inner = {place for name in file_names(folder) for place in Path(name).parents if place.name}
    bases = [Path(base) for base in folder_paths.get_folder_paths(folder)]
    whole = {place for place in inner if any(any((base / place).glob(mark)) for base in bases for mark in MARKS)}
    return sorted(str(place) for place in whole if whole.isdisjoint(place.parents))


def file_path(folder: str, name: str) -> str:
    """Finds a listed file or folder; the host's own error says it if it is gone."""
    for base in folder_paths.get_folder_paths(folder):
        if (Path(base) / name).is_dir():
            return str(Path(base) / name)
    return folder_paths.get_full_path_or_raise(folder, name)
