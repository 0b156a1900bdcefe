"""What a safe region is: its parts, the maths of gate and move, calibration, composition and the file format."""

from .balance import Attribute, assign, attribute_of, balance_conditioning, parse_shares
from .conditioning import Entry, apply_to_conditioning, text_blocks
from .files import load_region, region_bytes, region_from_bytes, save_region
from .paper import import_paper
from .region import Gate, Move, Part, Region, RegionError, Scope, combine
from .steering import steer

__all__ = [
    "Attribute", "Entry", "Gate", "Move", "Part", "Region", "RegionError", "Scope", "apply_to_conditioning", "assign",
    "attribute_of", "balance_conditioning", "combine", "import_paper", "load_region", "parse_shares", "region_bytes",
    "region_from_bytes", "save_region", "steer", "text_blocks",
]  # fmt: skip
