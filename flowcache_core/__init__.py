"""FlowCache's engine for Python users; docs/python.md shows how.

A name is imported when it is first asked for, so `import flowcache_core` alone does not even load torch.
"""

from importlib import import_module

_MODULES = {
    "calibration": ("calibrate",),
    "checkpoints": ("load_backbone", "load_experts"),
    "errors": ("UserError",),
    "generation": ("Change", "Result", "generate"),
    "media.pictures": ("report_picture",),
    "media.video": ("frames_of", "save_video"),
    "models.presets": ("preset", "quality_settings"),
    "report": ("Report",),
    "settings": ("Between", "Compression", "Drift", "Every", "Fixed", "HistorySettings", "Off", "Settings", "Spread"),
    "storage.calibrations": ("calibration_of", "calibration_path", "load_calibration", "save_calibration"),
    "storage.state": ("State", "load_state", "save_state"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'flowcache_core' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
