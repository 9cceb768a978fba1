"""Families outside transformers' experts interface: dbrx, jetmoe, llama4, longcat_flash, step3p7.

Each has its own experts class and its own loop over experts. This module replaces the method that
loops, on the modules of one model. The new method routes with ATen ops and leaves the experts to
`moecc.frontend.experts.run_experts`. It must compute the same as transformers' own;
tests/test_families.py compares the two.

  methods_replaced(model)   a context, for a trace
  replace_methods(model)    permanent, for a model that is loaded
  restore_methods(model)    the way back

Shapes: T tokens, B batch, S sequence, D hidden, k experts per token, E experts, F intermediate.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moecc.frontend.experts import EXPERTS_CLASSES, DenseOperands, ExpertsClass, run_experts
from moecc.frontend.probe import Layout, plain_layout, probe_gate
from moecc.types import FamilyModule

# ---------------------------------------------------------------- operands and gates


def _llama4_operands(module: FamilyModule) -> DenseOperands:
    return DenseOperands(module.gate_up_proj.transpose(1, 2), module.down_proj.transpose(1, 2))


def _dbrx_operands(module: FamilyModule) -> DenseOperands:
    """w1, v1 and w2 stack the rows of all experts: [E * F, D]."""
    shape = (module.num_experts, module.ffn_hidden_size, module.hidden_size)
    gate_up = torch.cat((module.mlp.w1.view(shape), module.mlp.v1.view(shape)), 1)
    return DenseOperands(gate_up, module.mlp.w2.view(shape).transpose(1, 2))


def _longcat_operands(module: FamilyModule) -> DenseOperands:
    """gate_up_proj also has rows for the identity experts, which nothing reads."""
    return DenseOperands(module.gate_up_proj[: module.num_routed_experts], module.down_proj)


def _jetmoe_operands(module: FamilyModule) -> DenseOperands:
    return DenseOperands(module.input_linear.weight, module.output_linear.weight)


def _step3p7_operands(module: FamilyModule) -> DenseOperands:
    return DenseOperands(module.gate_up_proj, module.down_proj)


def _glu(activation: str, *, transposed: bool = False) -> Callable[[nn.Module], Layout]:
    """Return the layout of a class that computes act(gate) * up in its own forward.

    activation: the dotted attribute that holds the activation.
    """

    def layout(module: FamilyModule) -> Layout:
        act = module
        for name in activation.split("."):
            act = getattr(act, name)
        return plain_layout(type(module).__name__, act, transposed=transposed)

    return layout


EXPERTS_CLASSES.update(
    Llama4TextExperts=ExpertsClass(_llama4_operands, _glu("act_fn", transposed=True)),
    DbrxExperts=ExpertsClass(_dbrx_operands, _glu("mlp.activation_fn")),
    LongcatFlashExperts=ExpertsClass(_longcat_operands, _glu("act_fn")),
    JetMoeMoE=ExpertsClass(_jetmoe_operands, _glu("activation")),
    Step3p7Experts=ExpertsClass(_step3p7_operands, probe_gate),
)

# ---------------------------------------------------------------- methods


def _llama4_moe(self: FamilyModule, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Llama4TextMoe.forward. hidden_states [B, S, D] -> [T, D], logits [T, E].

    The score scales the expert's *input*, so each chosen expert gets a row of its own.
    """
    x = hidden_states.reshape(-1, self.hidden_dim)
    logits = F.linear(x, self.router.weight)
    value, index = torch.topk(logits, self.top_k, dim=1)
    score = torch.sigmoid(value.float()).to(x.dtype)
    routed = (x.unsqueeze(1) * score.unsqueeze(-1)).reshape(-1, self.hidden_dim)
    y = run_experts(
        self.experts, routed, index.reshape(-1, 1), torch.ones_like(score).reshape(-1, 1)
    )
    out: Tensor = self.shared_expert(x) + y.view(-1, self.top_k, self.hidden_dim).sum(1)
    return out, logits


def _dbrx_experts(
    self: FamilyModule, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """DbrxExperts.forward. hidden_states [B, S, D] -> the same shape."""
    x = hidden_states.reshape(-1, self.hidden_size)
    return run_experts(self, x, top_k_index, top_k_weights).view(hidden_states.shape)


def _longcat_experts(
    self: FamilyModule, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """LongcatFlashExperts.forward. hidden_states [T, D] -> the same shape.

    Experts from num_routed_experts on return their input: x times their weight.
    """
    real = top_k_index < self.num_routed_experts
    index, weight = torch.where(real, top_k_index, 0), torch.where(real, top_k_weights, 0.0)
    identity = torch.where(real, 0.0, top_k_weights).sum(-1, keepdim=True)
    y = run_experts(self, hidden_states, index, weight)
    result: Tensor = y + (hidden_states * identity).to(hidden_states.dtype)
    return result


def _jetmoe_routing(gating: FamilyModule, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """JetMoeTopKGating.forward without its sorting: index [T, k], weight [T, k], logits [T, E]."""
    logits = gating.layer(x).float()
    value, index = logits.topk(gating.top_k, dim=1)
    return index, torch.softmax(value, dim=1).type_as(x), logits


def _jetmoe_moe(self: FamilyModule, layer_input: Tensor) -> Tensor:
    """JetMoeMoE.forward. layer_input [B, S, D] -> the same shape."""
    x = layer_input.reshape(-1, self.input_size)
    index, weight, _ = _jetmoe_routing(self.router, x)
    y: Tensor = run_experts(self, x, index, weight).view(layer_input.shape) + self.bias
    return y


def _jetmoe_map(
    self: FamilyModule, layer_input: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """JetMoeMoA.map: the query projections of the chosen attention experts.

    [B, S, D] -> [B, S, k, heads * head_dim].
    """
    batch, sequence, width = layer_input.shape
    x = layer_input.reshape(-1, width)
    index, weight, logits = _jetmoe_routing(self.router, x)
    y = torch.ops.moecc.expert_linear(x, index, self.input_linear.weight)
    return y.view(batch, sequence, self.top_k, self.hidden_size), logits, (index, weight)


def _jetmoe_reduce(
    self: FamilyModule, layer_input: Tensor, topo_info: tuple[Tensor, Tensor]
) -> Tensor:
    """JetMoeMoA.reduce: the summed output projections of the chosen attention experts.

    [B, S, k, heads * head_dim] -> [B, S, D].
    """
    index, weight = topo_info
    batch, sequence, k, width = layer_input.shape
    x = layer_input.reshape(-1, k, width)
    y = torch.ops.moecc.expert_linear(x, index, self.output_linear.weight)
    y = (y * weight.unsqueeze(-1)).sum(1)
    combined: Tensor = y.view(batch, sequence, self.input_size) + self.bias
    return combined


# class name -> {method: replacement}
METHODS: dict[str, dict[str, Callable[..., object]]] = {
    "Llama4TextMoe": {"forward": _llama4_moe},
    "DbrxExperts": {"forward": _dbrx_experts},
    "LongcatFlashExperts": {"forward": _longcat_experts},
    "JetMoeMoE": {"forward": _jetmoe_moe},
    "JetMoeMoA": {"map": _jetmoe_map, "reduce": _jetmoe_reduce},
    "Step3p7Experts": {"forward": run_experts},
}


def replace_methods(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Replace the methods of every module of `model` that needs it.

    Return the pairs (module, method) that were not replaced before.
    """
    replaced = []
    for module in model.modules():
        for method, function in METHODS.get(type(module).__name__, {}).items():
            if method not in module.__dict__:
                setattr(module, method, types.MethodType(function, module))
                replaced.append((module, method))
    return replaced


def restore_methods(model: nn.Module) -> None:
    """Give every module of `model` its own methods back."""
    for module in model.modules():
        for method in METHODS.get(type(module).__name__, {}):
            module.__dict__.pop(method, None)


@contextmanager
def methods_replaced(model: nn.Module) -> Iterator[None]:
    """Replace the methods for the time of a trace."""
    replaced = replace_methods(model)
    try:
        yield
    finally:
        for module, method in replaced:
            delattr(module, method)
