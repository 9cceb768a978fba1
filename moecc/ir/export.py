"""Leave the IR: an ordinary torch.export program with every weight loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument

from moecc.ir.graph import copy_module
from moecc.ir.tensors import Weight


def exported(
    source: fx.GraphModule,
    weights: Mapping[str, Weight],
    read: Callable[[str], Tensor],
    traced: ExportedProgram,
) -> ExportedProgram:
    """Return a copy of `source` as an exported program whose weights are buffers.

    weights: by placeholder name. read: gives a weight's tensor by its name. traced: the exported
    program that `source` came from; inputs, outputs and range constraints are its own.
    """
    module = copy_module(source)
    old = traced.graph_signature
    user = [s for s in old.input_specs if s.kind == InputKind.USER_INPUT]
    specs, state = [], {}
    for node in module.graph.nodes:
        if node.op == "placeholder" and node.name in weights:
            name = weights[node.name].name
            specs.append(InputSpec(InputKind.BUFFER, TensorArgument(node.name), name, True))
            state[name] = read(name)
    output = next(n for n in module.graph.nodes if n.op == "output")
    outputs = [copy.copy(s) for s in old.output_specs]
    for spec, value in zip(outputs, output.args[0], strict=True):
        if isinstance(value, fx.Node):
            spec.arg = TensorArgument(value.name)
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=ExportGraphSignature([*specs, *user], outputs),
        state_dict=state,
        range_constraints=traced.range_constraints,
        module_call_graph=copy.deepcopy(traced.module_call_graph[:1]),
        example_inputs=traced.example_inputs,
        constants={},
        verifiers=traced.verifiers,
    )
