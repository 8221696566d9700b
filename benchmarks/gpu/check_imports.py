"""Imports all that the check needs, and says in one line what is there: the first command on another machine."""

import bitsandbytes
import datasets
import peft
import torch
import transformers
import trl

_LIBRARIES = (torch, transformers, trl, peft, datasets, bitsandbytes)
print(
    *(f"{library.__name__} {library.__version__}" for library in _LIBRARIES),
    f"GPU: {torch.cuda.get_device_name(0) if torch.cuda.is_available() else 'none that torch can use'}",
)
