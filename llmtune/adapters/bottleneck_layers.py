"""Bottleneck adapters as a PEFT method: with this module imported, `PeftModel.from_pretrained` loads them."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import PreTrainedModel

from llmtune.kernels.device import autocast_dtype
from llmtune.model.mlp import LinearLayer, Mlp, features, mlps, set_features, widen, widen_mlp


def _add_peft_type(name: str) -> None:
    """Add a member to PEFT's enum of methods, which it checks a method's name against."""
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    setattr(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member


_add_peft_type("BOTTLENECK")


@dataclass
class BottleneckConfig(PeftConfig):
    """A narrow MLP of width `size` beside (parallel) or behind (sequential) each target; None targets every block."""

    target_modules: list[str] | str | None = field(default=None)
    size: int = field(default=16)
    form: str = field(default="parallel")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.BOTTLENECK
        if self.form not in ("parallel", "sequential"):
            raise ValueError(f"a bottleneck adapter's form is parallel or sequential, not {self.form!r}")
        if self.size < 1:
            raise ValueError(f"a bottleneck adapter's size is at least 1, not {self.size}")


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A block's MLP with an adapter: y + down(act(gate(x)) * up(x)) in parallel, or y + down(act(up(y))) behind it."""

    adapter_layer_names = ("bottleneck_gate", "bottleneck_up", "bottleneck_down")
    other_param_names = ("forms",)

    def __init__(self, base_layer: nn.Module, mlp: Mlp, adapter_name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.mlp = mlp
        self.bottleneck_gate = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_down = nn.ModuleDict()
        self.forms: dict[str, str] = {}
        self._input: torch.Tensor | None = None
        # Where the block itself holds the layers, this wraps the last of them and sees the MLP's input at the first.
        tapped = [mlp.inputs[0].layer] if base_layer is mlp.down else []
        self.taps = [layer.register_forward_pre_hook(self._keep_input) for layer in tapped]
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def _keep_input(self, module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        self._input = arguments[0]

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an fp32 adapter whose output is zero, so that the untrained model is the base, bit for bit."""
        hidden, biased = features(self.mlp.down)[1], self.mlp.down.bias is not None
        self.forms[adapter_name] = config.form
        own = {part: one.layer for one in self.mlp.inputs for part in one.parts}
        for part in ["up"] if config.form == "sequential" else own:
            bias = biased if config.form == "sequential" else own[part].bias is not None
            layer = nn.Linear(hidden, config.size, bias=bias, dtype=torch.float32)
            if config.form == "parallel":
                # With PyTorch's spread, gate times up is 60 times smaller than in the MLP itself: slow to learn.
                nn.init.normal_(layer.weight, std=_spread(own[part]))
            if bias:
                nn.init.zeros_(layer.bias)
            getattr(self, f"bottleneck_{part}")[adapter_name] = layer
        down = nn.Linear(config.size, hidden, bias=biased, dtype=torch.float32)
        for parameter in down.parameters():
            nn.init.zeros_(parameter)
        self.bottleneck_down[adapter_name] = down
        self._move_adapter_to_device_of_base_layer(adapter_name)  # type: ignore[operator]
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)  # type: ignore[operator]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return self.mlp.down.weight.device, torch.float32

    def forward(self, x: torch.Tensor, *args: object, **named: object) -> torch.Tensor:
        """Return the MLP's output plus what the active adapters add: (..., hidden)."""
        tapped, self._input = self._input, None
        out: torch.Tensor = self.base_layer(x, *args, **named)
        if self.disable_adapters or self.merged:
            return out
        source = x if tapped is None else tapped
        for name in self.active_adapters:  # type: ignore[union-attr]
            if name in self.bottleneck_down:
                out = out + self._branch(name, out if self.forms[name] == "sequential" else source).to(out.dtype)
        return out

    def _branch(self, name: str, x: torch.Tensor) -> torch.Tensor:
        # Autocast would cast it back. One node adds the gradients of gate and up before others, as a cast does.
        x = x.view_as(x) if x.dtype == autocast_dtype(x.device) else x.float()
        up = self.bottleneck_up[name](x)
        gated = name in self.bottleneck_gate
        inner = self.mlp.act(self.bottleneck_gate[name](x)) * up if gated else self.mlp.act(up)
        branch: torch.Tensor = self.bottleneck_down[name](inner)
        return branch

    def parts(self, name: str) -> dict[str, nn.Linear]:
        """Return an adapter's layers: gate where the MLP has one, up and down."""
        parts = {part.removeprefix("bottleneck_"): getattr(self, part) for part in self.adapter_layer_names}
        return {part: layers[name] for part, layers in parts.items() if name in layers}


def _spread(layer: nn.Module) -> float:
    """Return the standard deviation of a layer's weights, in 4 bits or not; 0 on the meta device."""
    weight = dequantize_module_weight(layer)
    return 0.0 if weight.is_meta else float(weight.detach().float().std())


@dataclass(eq=False)
class WideMlp:
    """A block's MLP as it is once an adapter is merged: wider by the adapter's layers, or by zeros without one."""

    mlp: Mlp
    layer: BottleneckLayer | None
    adapter: str
    size: int
    _features: list[tuple[int, int]] = field(default_factory=list)

    @property
    def layers(self) -> list[LinearLayer]:
        """The linear layers that become wider."""
        return [*(part.layer for part in self.mlp.inputs), self.mlp.down]

    @torch.no_grad()
    def widen(self) -> None:
        """Make the MLP wider, whose weights are in memory; its adapter adds nothing more."""
        self._features = [features(layer) for layer in self.layers]
        widen_mlp(self.mlp, self.layer.parts(self.adapter) if self.layer else {}, self.size)
        self._mark([self.adapter])

    def narrow(self) -> None:
        """Take the MLP for what it was, whose weights are about to be freed."""
        for layer, (inputs, outputs) in zip(self.layers, self._features, strict=False):
            set_features(layer, inputs, outputs)
        self._mark([])

    def _mark(self, merged: list[str]) -> None:
        names: Any = self.layer.merged_adapters if self.layer else []
        names[:] = merged


class BottleneckModel(BaseTuner):
    """A model with bottleneck adapters; `merge_and_unload` gives a stock model with a wider MLP."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config: BottleneckConfig, model_config: object) -> BottleneckConfig:
        return peft_config

    def _prepare_model(self, peft_config: BottleneckConfig, model: PreTrainedModel) -> None:
        if "_mlps" not in self.__dict__:
            self._mlps = {mlp.name: mlp for mlp in mlps(model)}
        if peft_config.target_modules is None:
            peft_config.target_modules = list(self._mlps)

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        if current_key not in self._mlps:
            raise ValueError(
                f"{current_key} is no block's MLP; bottleneck adapters go to {next(iter(self._mlps))} etc."
            )
        layer = BottleneckLayer(target, self._mlps[current_key], adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def wide_mlps(self) -> list[WideMlp]:
        """The MLP of every block as a merged model has it, one at a time to be made wider."""
        name = self.active_adapters[0]
        layers = {layer.mlp.name: layer for layer in self.model.modules() if isinstance(layer, BottleneckLayer)}
        size = self.peft_config[name].size
        return [WideMlp(mlp, layers.get(mlp.name), name, size) for mlp in self._mlps.values()]

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> PreTrainedModel:
        """Return the base alone or, merged, with the adapter as part of a wider MLP; raises ValueError."""
        names = adapter_names or self.active_adapters
        if merge and len(names) != 1:
            raise ValueError(f"one bottleneck adapter is merged at a time, not {len(names)}: {', '.join(names)}")
        if merge and self.peft_config[names[0]].form == "sequential":
            raise ValueError("a sequential bottleneck cannot be merged: no stock model has a layer behind the MLP")
        layers = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, BottleneckLayer)}
        for name, layer in layers.items():
            for tap in layer.taps:
                tap.remove()
            self.model.set_submodule(name, layer.base_layer)
        del self.model.peft_config
        if not merge:
            return self.model
        parts = {name: layer.parts(names[0]) for name, layer in layers.items()}
        return widen(self.model, list(self._mlps.values()), parts, self.peft_config[names[0]].size)


register_peft_method(name="bottleneck", config_cls=BottleneckConfig, model_cls=BottleneckModel)
