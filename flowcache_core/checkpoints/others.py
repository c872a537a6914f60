"""Models that share names with Wan or are tried in its place: told by their tensors, and refused by name."""

import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import UserError

IMAGE_TO_VIDEO = "Wan image-to-video"
# Names as diffusers 0.42.1 and the models' own repositories have them, the surer ones first.
KINDS = {
    r"(^|\.)patch_(short|mid|long)\.": "Helios",
    r"(^|\.)far_patch_embedding\.": "AnyFlow-FAR",
    r"(^|\.)delta_embedder\.": "AnyFlow",
    r"(^|\.)clean_x_embedder\.": "FramePack",
    r"token_refiner\.": "HunyuanVideo or FramePack",
    r"(^|\.)(attention_y_norm|caption_norm)\.weight$": "SANA-Video or another SANA",
    r"(^|\.)patchify_proj\.weight$|^proj_in\.weight$": "LTX-Video",
    r"(^|\.)vace_": "Wan VACE",
    r"(^|\.)(motion_encoder|face_adapter|face_encoder)\.": "Wan Animate",
    r"(^|\.)(casual_audio_encoder|audio_injector|audio_proj)\.": "a Wan that follows speech",
    r"(^|\.)(control_adapter|ref_conv)\.": "Wan Fun (control or camera)",
    r"(^|\.)patch_embedding_(mask|pose|global)\.": "a Wan that follows a pose",
    r"(^|\.)(img_emb|image_embedder|k_img|add_k_proj)\.": IMAGE_TO_VIDEO,
}
LONGVIE = " (for LongVie 2: give a folder with this, its control.safetensors and its dit.safetensors)"


def is_led(names: Iterable[str]) -> bool:
    """Whether tensors of an image-to-video network have LongVie's control layers beside them."""
    return any(name.startswith("control_blocks_dense.") for name in names)


def refuse_others(path: Path, names: Iterable[str]) -> None:
    """Raises UserError for a network of another model, which it names.

    Args:
        names: of all its tensors.
    """
    names = list(names)
    if is_led(names):
        return
    for pattern, kind in KINDS.items():
        for name in names:
            if re.search(pattern, name):
                led = LONGVIE if kind == IMAGE_TO_VIDEO else ""
                raise UserError(
                    f"{path.name} is {kind} (it has {name}), which is not run here{led}; expected a text-to-video "
                    "network of the Wan 2.1 layout, to which images are given as a prefix, or MAGI-1: see "
                    "docs/models.md."
                )
