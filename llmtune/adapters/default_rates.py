"""Default learning rates at the output, by adapter and model size; docs/methods.md gives their sources."""

import math

_SIZES = (135e6, 1e9, 8e9, 70e9)
_FULL = (1e-4, 3e-5, 1e-5, 5e-6)
_LORA = (1e-3, 5e-4, 3e-4, 2e-4)
_IA3 = (5e-3, 5e-3, 5e-3, 3e-3)
_BOTTLENECK = (1e-3, 5e-4, 3e-4, 1e-4)
_INIT_FACTOR = {"pissa": 1 / 10, "olora": 1 / 18}


def full_rate(parameters: int, share: float) -> float:
    """The rate without an adapter where `share` of the blocks trains: ten times the full rate for the head alone."""
    return _rounded(_by_size(parameters, _FULL) * 10 ** (1 - share))


def lora_rate(parameters: int, effective_alpha: float, init: str) -> float:
    """The rate at alpha 32 for the model's size, carried over to this alpha and initialisation."""
    return _rounded(_by_size(parameters, _LORA) * 32 / effective_alpha * _INIT_FACTOR.get(init, 1.0))


def ia3_rate(parameters: int) -> float:
    """The rate of rescaling vectors."""
    return _rounded(_by_size(parameters, _IA3))


def bottleneck_rate(parameters: int) -> float:
    """The rate of bottleneck adapters."""
    return _rounded(_by_size(parameters, _BOTTLENECK))


def _by_size(parameters: int, rates: tuple[float, ...]) -> float:
    """The rate for that many parameters, interpolated in logarithms and flat outside the table."""
    position = math.log(min(max(parameters, _SIZES[0]), _SIZES[-1]))
    upper = next(index for index, size in enumerate(_SIZES[1:], 1) if position <= math.log(size) + 1e-12)
    low, high = math.log(_SIZES[upper - 1]), math.log(_SIZES[upper])
    share = (position - low) / (high - low)
    return float(rates[upper - 1] ** (1 - share) * rates[upper] ** share)


def _rounded(rate: float) -> float:
    """Two digits: a default is no more exact than that."""
    return float(f"{rate:.1e}")
