"""Files of weights from others: what they are, their weights read safely, and what runs them."""

from .backbone import Loaded, load_backbone
from .conversion import convert, stamp
from .family import CAUSAL_FAMILIES, FAMILIES, MAGI_FAMILIES, STAMP
from .reading import CheckpointInfo, inspect, load, load_state_dict

__all__ = [
    "CAUSAL_FAMILIES",
    "FAMILIES",
    "MAGI_FAMILIES",
    "STAMP",
    "CheckpointInfo",
    "Loaded",
    "convert",
    "inspect",
    "load",
    "load_backbone",
    "load_state_dict",
    "stamp",
]
