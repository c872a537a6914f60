"""Files of weights from others: what they are, their weights read safely, and what runs them."""

from .backbone import Loaded, load_backbone, load_experts
from .conversion import convert, stamp
from .family import CAUSAL_FAMILIES, FAMILIES, MAGI_FAMILIES, OF_TWO_NETWORKS, STAMP, wan_families
from .reading import CheckpointInfo, inspect, load
