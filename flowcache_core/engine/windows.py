"""A long video in windows, as SkyReels-V2 makes it: each after the first begins with the end of the one before."""

from ..errors import UserError


def window_sizes(frames: int, longest: int, overlap: int, chunk_frames: int = 1) -> list[int]:
    """Latent frames of each window, those that it takes over from the one before included.

    Args:
        frames: of the whole video.
        longest: of a window.
        overlap: that a window takes over; they are given, not generated.
        chunk_frames: of a chunk; what a window generates must fill whole chunks.

    Raises:
        UserError: windows that do not get on, or chunks that are not filled.

    Source: SkyReels-V2, skyreels_v2_infer/pipelines/diffusion_forcing_pipeline.py (base_num_frames, overlap_history).
    """
    if not 0 < overlap < longest:
        raise UserError(
            f"The overlap is {overlap} of a window's {longest} frames; expected at least 1 and less than that."
        )
    sizes = [min(frames, longest)]
    done = sizes[0]
    while done < frames:
        new = min(frames - done, longest - overlap)
        sizes.append(overlap + new)
        done += new
    for number, size in enumerate(sizes):
        new = size if number == 0 else size - overlap
        if new % chunk_frames:
            raise UserError(
                f"Window {number + 1} generates {new} frames, which do not fill chunks of {chunk_frames}; "
                "change the length, the window or the overlap by whole chunks."
            )
    return sizes
