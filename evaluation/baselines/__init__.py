"""The methods that the benchmark compares with, each from its paper and, where that differs, its authors' code.

None of their code is in here. Every function takes a demo backbone and returns a `Method`; the backbone's own model,
which others share, is never changed.
"""

from .debias_vl import debias_vl_method
from .esd import esd_method
from .method import Conditioning, Method
from .nag import nag_method
from .prompts import negative_prompt_method, none_method, sfw_words_method
from .rece import rece_method
from .safree import safree_method
from .shift import condelta_method, mean_difference_method
from .sld import sld_method
from .uce import uce_method
from .uce_debias import uce_debias_method

__all__ = [
    "Conditioning",
    "Method",
    "condelta_method",
    "debias_vl_method",
    "esd_method",
    "mean_difference_method",
    "nag_method",
    "negative_prompt_method",
    "none_method",
    "rece_method",
    "safree_method",
    "sfw_words_method",
    "sld_method",
    "uce_debias_method",
    "uce_method",
]
