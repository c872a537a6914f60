"""What Autoregressive Extend shows while it samples, on a server that was started without a way of previews too."""

import time
from collections.abc import Callable

import comfy.model_patcher
import latent_preview
from comfy.cli_args import LatentPreviewMethod, args
from server import PromptServer

SECONDS = 0.5  # between two pictures: each makes the device wait


def preview_callback(model: comfy.model_patcher.ModelPatcher, ticks: int, elsewhere: bool) -> Callable:
    """The host's callback of a sampler, with the previews that the user chose for the server or in the page; where
    nobody chose, a rough picture by the latent's colours twice a second.

    Args:
        elsewhere: finished chunks are shown in its place.
    """
    chosen = latent_preview.prepare_callback(model, ticks)
    if args.preview_method != LatentPreviewMethod.NoPreviews or elsewhere or _declined():
        return chosen
    args.preview_method = LatentPreviewMethod.Latent2RGB
    try:
        pictured = latent_preview.prepare_callback(model, ticks)
    finally:
        args.preview_method = LatentPreviewMethod.NoPreviews
    last = -SECONDS

    def callback(step, x0, x, total_steps):
        nonlocal last
        now = time.monotonic()
        due = now - last >= SECONDS
        last = now if due else last
        (pictured if due else chosen)(step, x0, x, total_steps)

    return callback


def _declined() -> bool:
    """Whether the prompt that runs asks for no previews, as the page's setting has it sent."""
    running, _ = PromptServer.instance.prompt_queue.get_current_queue_volatile()
    return any(item[3].get("preview_method") == "none" for item in running)
