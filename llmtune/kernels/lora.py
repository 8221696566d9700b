"""LoRA layers under autocast, on any device."""

from peft.tuners.lora.layer import LoraLayer
from torch import nn


def skip_input_casts(model: nn.Module) -> None:
    """Let LoRA layers give 16-bit input straight to autocast; PEFT's way through fp32 and back gives the same bits."""
    for module in (module for module in model.modules() if isinstance(module, LoraLayer)):
        # A dropout or a variant (DoRA) computes in the precision that it is given.
        dropouts = module.lora_dropout.values()
        if not module.lora_variant and all(isinstance(dropout, nn.Identity) for dropout in dropouts):
            module.cast_input_dtype_enabled = False
