"""PEFT's side of an artifact: adapters stand beside compressed modules, and are never in them.

  quantized linears    take adapters that add to what they compute, such as LoRA; their codes can't
                       hold the sum
  compressed experts   take none

PEFT finds neither out: it takes codes for weights, and trains the rest of an adapter if parameters
aren't there. So `moecc.hook` imports this module right after PEFT's base class, and the module
adds checks to methods of that class.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from moecc.errors import MoeccError
from moecc.frontend.compressed import QuantizedLinear, removed_parameters

# Kinds of adapters that add to a linear's output or scale it, and initial values that do not
# change the weights.
BESIDE = ("LORA", "ADALORA", "IA3", "VERA", "OFT")
PLAIN_STARTS = ("gaussian", "eva")


def _require_mergeable(model: nn.Module) -> None:
    for path, module in model.named_modules():
        path, inside, _ = path.rpartition(".base_layer")
        if isinstance(module, QuantizedLinear) and inside:
            raise MoeccError(
                f"{path}: the codes of a quantized linear can't hold an adapter too; "
                "call the model's dequantize() before merging"
            )


def _require_adaptable(tuner: BaseTuner, model: nn.Module, config: Any) -> None:
    """Raise MoeccError if an adapter of `config` can't be trained on `model`."""
    targets = getattr(config, "target_modules", None)
    parameters = [f".{name}" for name in getattr(config, "target_parameters", None) or ()]

    def targeted(path: str) -> bool:
        return bool(targets) and bool(tuner._check_target_module_exists(config, path))

    for path, module in model.named_modules():
        path = path.removesuffix(".base_layer")  # of an adapter that is there already
        if isinstance(module, QuantizedLinear):
            reader = _reader(config)
            if reader and (targets == "all-linear" or targeted(path)):
                raise MoeccError(
                    f"{path}: {reader} needs the float weights of a quantized linear; "
                    "use plain LoRA, or call the model's dequantize() first"
                )
        elif removed := removed_parameters(module):
            names = [f".{path}.{name}" for name in removed]
            parts = path, f"{path}.gate_up", f"{path}.down"
            if any(n.endswith(p) for n in names for p in parameters) or any(map(targeted, parts)):
                raise MoeccError(
                    f"{path}: compressed experts take no adapter; leave them out of it, or train "
                    "it on the float model that dequantize() gives and compile with it again"
                )


def _reader(config: Any) -> str | None:
    """Return what in an adapter's configuration reads the weights that it adapts, if anything."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    start = getattr(config, "init_lora_weights", None)
    if kind not in BESIDE:
        return kind
    if isinstance(start, str) and start not in PLAIN_STARTS:
        return f"init_lora_weights={start!r}"
    return next((key for key in ("use_dora", "kasa_config") if getattr(config, key, None)), None)


def _checking(method: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    @wraps(method)
    def checked(tuner: BaseTuner, *args: Any, **kwargs: Any) -> Any:
        check(tuner, *args, **kwargs)
        return method(tuner, *args, **kwargs)

    return checked


def _on_merging(tuner: BaseTuner, *args: Any, **kwargs: Any) -> None:
    _require_mergeable(tuner.model)


def _extend(checks: Mapping[str, Callable[..., None]]) -> None:
    """Let the methods of PEFT's base class make further checks before their own."""
    for name, check in checks.items():
        if not hasattr(BaseTuner, name):
            warnings.warn(
                f"this version of PEFT has no BaseTuner.{name}, by which moecc refuses what its "
                "compressed modules can't take; use another version",
                stacklevel=2,
            )
            continue
        setattr(BaseTuner, name, _checking(getattr(BaseTuner, name), check))


_extend(
    {
        # not PEFT's own check of this, which some tuners, such as that of mixed models, leave out
        "merge_and_unload": _on_merging,
        "merge_adapter": _on_merging,
        "_check_tied_modules": _require_adaptable,
    }
)
