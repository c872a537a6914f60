"""Inputs that several nodes have, so that their ranges agree."""

from comfy_api.latest import io


def seed(tooltip: str):
    return io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip=tooltip)


def pixels(name: str, default: int, least: int, tooltip: str):
    return io.Int.Input(name, default=default, min=least, max=8192, step=16, tooltip=tooltip)


def steps(default: int, least: int, tooltip: str):
    return io.Int.Input("steps", default=default, min=least, max=1000, tooltip=tooltip)


def lag(default: int, least: int, tooltip: str):
    return io.Int.Input("lag", default=default, min=least, max=1000, tooltip=tooltip)


def guidance(default: float, tooltip: str):
    return io.Float.Input("guidance", default=default, min=0.0, max=100.0, step=0.1, tooltip=tooltip)


def shift(default: float, least: float, tooltip: str):
    return io.Float.Input("shift", default=default, min=least, max=100.0, step=0.1, tooltip=tooltip)


def condition_noise(default: float, least: float, tooltip: str):
    return io.Float.Input("condition_noise", default=default, min=least, max=1.0, step=0.01, tooltip=tooltip)


def filename_prefix():
    return io.String.Input(
        "filename_prefix",
        default="flowcache/video",
        tooltip="Name of the file in ComfyUI's output folder, a number is added; '/' makes a subfolder.",
    )


def fps():
    return io.Float.Input("fps", default=16.0, min=1.0, max=120.0, step=1.0, tooltip="Frames a second of the video.")
