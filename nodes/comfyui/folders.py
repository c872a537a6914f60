"""The host's folders of models."""

import folder_paths


def file_names(folder: str) -> list[str]:
    """Lists the files of a folder such as "vae", as the page offers them."""
    return folder_paths.get_filename_list(folder)


def file_path(folder: str, name: str) -> str:
    """Finds a listed file; the host's own error says it if it is gone."""
    return folder_paths.get_full_path_or_raise(folder, name)
