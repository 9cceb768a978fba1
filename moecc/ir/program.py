"""The IR: a torch.fx graph in the moecc dialect, the weights behind its placeholders, and what is known about both.

A Program's graph is *lifted*: every parameter, buffer and constant is a placeholder, user inputs come last. A placeholder stands
for a `Weight`, which is one of
  plain      a tensor of the checkpoint, read from the store when asked for;
  derived    a small graph over other weights (a transposed or interleaved experts tensor made canonical), computed when read;
  held       a tensor that tracing captured or a pass made (`Program.tensors`).
So a program of any size fits in memory, and a pass sees one canonical layout whatever the checkpoint's.

Every node carries meta["val"] (its fake value), meta["layer"] (0 before the first decoder layer, i + 1 in decoder layer i, one more
after the last; never smaller than that of its inputs) and meta["path"] (its module's path).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument

from moecc.errors import MoeccError
from moecc.ir import ops
from moecc.ir.graph import ancestors, arg_text, copy_module, target_text, type_text
from moecc.ir.moe import MoE, check_operands, operand_names, router_logits
from moecc.ir.tensors import Held, Store, digest, nonfinite


class Resizer(Protocol):
    """Makes programs of the same model with fewer experts (`moecc.frontend.resize`)."""

    def groups(self, program: Program) -> int: ...
    def require(self, program: Program, counts: Mapping[str, int]) -> None: ...
    def resize(self, program: Program, keep: Mapping[str, Sequence[int]]) -> Program: ...


@dataclass(frozen=True)
class Weight:
    """What a placeholder stands for: `name`, and for a derived weight the graph that computes it from `sources`."""

    name: str
    recipe: fx.GraphModule | None = None
    sources: tuple[str, ...] = ()


@dataclass(eq=False)
class Program:
    """A model as passes see it. `facts` are what the passes so far have established (`moecc.pipeline.passes.Pass`)."""

    module: fx.GraphModule
    weights: dict[str, Weight]  # placeholder name -> what it stands for
    tensors: Held  # held tensors by weight name
    store: Store | None
    exported_from: (
        ExportedProgram  # signature pieces that torch.export wants back; its graph is not used
    )
    config: Any = None
    source: str = ""
    dtype: torch.dtype = torch.float32
    restriction: str = ""  # a limit on input shapes that the trace had to accept
    unreached: tuple[str, ...] = ()  # parameters that no traced path reads
    facts: set[str] = field(default_factory=set)
    # dotted entry of config.json -> its value, where a pass has changed the model's sizes
    config_edits: dict[str, object] = field(default_factory=dict)
    # held weights whose values the checkpoint's own type holds exactly
    rounded: set[str] = field(default_factory=set)
    # path of an MoE layer -> the source's numbers of its experts, where a pass has taken some out
    kept: dict[str, tuple[int, ...]] = field(default_factory=dict)
    resizer: Resizer | None = None  # makes the program with fewer experts

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def layers(self) -> int:
        """Stages of the graph: decoder layers plus what comes before and after."""
        return 1 + max(int(n.meta["layer"]) for n in self.graph.nodes if n.op == "call_function")

    @property
    def user_inputs(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "placeholder" and n.name not in self.weights]

    def moe_layers(self) -> list[MoE]:
        """Every experts node of the dialect, dense or compressed, in graph order."""
        found = [n for n in self.graph.nodes if n.op == "call_function" and n.target in ops.MOE_OPS]
        return [MoE(n, n.meta["path"], n.meta["layer"], router_logits(n)) for n in found]

    # ---- weights

    def read(self, name: str, *, experts: Sequence[int] | None = None) -> Tensor:
        """The tensor called `name` in the program's dtype (integers as they are); `experts` picks rows of [E, ...]."""
        if name in self.tensors:
            held = self.tensors[name]
            return held if experts is None else held[list(experts)]
        derived = next(
            (w for w in self.weights.values() if w.name == name and w.recipe is not None), None
        )
        if derived is not None and derived.recipe is not None:
            with torch.no_grad():
                value: Tensor = derived.recipe(*[self.read(s) for s in derived.sources])
            return value.contiguous() if experts is None else value[list(experts)]
        if self.store is None:
            raise MoeccError(
                f"{name}: no weights, the program was traced from a config; give a checkpoint folder or hub id"
            )
        if name not in self.store:
            raise MoeccError(
                f"{name}: not in the checkpoint {self.source}; give a complete checkpoint"
            )
        return self.store.read(name, dtype=self.dtype, experts=experts)

    def value(self, placeholder: fx.Node) -> Tensor:
        """The tensor that a placeholder of a weight stands for."""
        return self.read(self.weights[placeholder.name].name)

    def origins(self, name: str) -> tuple[str, ...]:
        """The model parameters that the weight called `name` is computed from (itself where it is plain)."""
        derived = next(
            (w for w in self.weights.values() if w.name == name and w.recipe is not None), None
        )
        return derived.sources if derived else (name,)

    def stored_dtype(self, name: str) -> torch.dtype:
        """The type that the checkpoint stores a weight in, the program's own where it has no such weight."""
        return (
            self.dtype if self.store is None or name not in self.store else self.store.dtype(name)
        )

    # ---- rewriting

    def add(self, name: str, tensor: Tensor) -> fx.Node:
        """A new held weight and its placeholder; an existing name is given its new value, where a derived weight reads it too.

        A weight of the checkpoint is stored in the program's type then; `rewrite` rounds it to the checkpoint's.
        """
        if sources := next(
            (w.sources for w in self.weights.values() if w.name == name and w.recipe is not None),
            None,
        ):
            what = "that its new value" if len(sources) == 1 else "those their new values"
            raise MoeccError(f"{name} is computed from {', '.join(sources)}; give {what}")
        self.tensors[name] = tensor
        self.rounded.discard(name)
        for node in self.graph.nodes:
            weight = self.weights.get(node.name) if node.op == "placeholder" else None
            if weight is not None and name in (weight.name, *weight.sources):
                if weight.name == name:
                    node.meta["val"] = self._fake(tensor)
                found: fx.Node = node
                return found
        first_input = self.user_inputs[0]
        with self.graph.inserting_before(first_input):
            node = self.graph.placeholder("w_" + name.replace(".", "_"))
        node.meta.update(val=self._fake(tensor), layer=0, path="")
        self.weights[node.name] = Weight(name)
        return node

    def rewrite(self, name: str, value: Tensor) -> fx.Node:
        """Give a weight of the checkpoint a new value, rounded to the type it is stored in, so that it takes no more room."""
        node = self.add(name, value.to(self.stored_dtype(name)).to(self.dtype))
        self.rounded.add(name)
        return node

    def replace(
        self, node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> fx.Node:
        """Make `node` a call of `target`, of the same result shape; drop weights that nothing reads any more.

        It stays the same node and keeps its name, so that a rewritten program still lines up with its float reference.
        """
        node.target, node.args, node.kwargs = target, args, kwargs
        self.drop_unused()
        return node

    def drop_unused(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and node.name in self.weights and not node.users:
                name = self.weights.pop(node.name).name
                self.tensors.pop(name, None)
                self.graph.erase_node(node)

    def expert_groups(self) -> int:
        """Groups of neighbouring experts from which the router chooses first; equally many must stay in each."""
        return 1 if self.resizer is None else self.resizer.groups(self)

    def require_experts(self, counts: Mapping[str, int]) -> None:
        """MoeccError, which says what is possible, if the layers named by path can't have this many experts."""
        if self.resizer is None:
            raise MoeccError(
                "the number of experts of this program can't change; trace it from a folder"
            )
        self.resizer.require(self, counts)

    def keep_experts(self, keep: Mapping[str, Sequence[int]]) -> None:
        """Leave the layers named by path with the experts `keep` (ascending) alone.

        Router, configuration and stored shapes follow: the program is what a trace of the smaller model gives, weights
        that were rewritten before included. MoeccError as from `require_experts`.
        """
        self.require_experts({path: len(rows) for path, rows in keep.items()})
        assert self.resizer is not None
        made = self.resizer.resize(self, keep)
        for f in fields(self):
            setattr(self, f.name, getattr(made, f.name))

    def copy(self) -> Program:
        """The same program with a graph of its own; tensors and store are shared."""
        return replace(
            self,
            module=copy_module(self.module),
            weights=dict(self.weights),
            tensors=Held(self.tensors),
            facts=set(self.facts),
            rounded=set(self.rounded),
            config_edits=dict(self.config_edits),
            kept=dict(self.kept),
        )

    def _fake(self, tensor: Tensor) -> Tensor:
        mode = next(
            n.meta["val"].fake_mode
            for n in self.graph.nodes
            if hasattr(n.meta.get("val"), "fake_mode")
        )
        fake: Tensor = mode.from_tensor(tensor.detach(), static_shapes=True)
        return fake

    # ---- checking and printing

    def verify(self) -> None:
        """Raise MoeccError where the graph breaks a rule of the IR, naming node and shape."""
        try:
            self.graph.lint()
        except RuntimeError as e:  # torch.fx adds the whole graph
            raise MoeccError(f"the graph isn't one: {str(e).splitlines()[0]}") from e
        for node in self.graph.nodes:
            if node.op == "placeholder" and node.name in self.weights:
                self._verify_weight(node)
            if node.op != "call_function":
                continue
            if "val" not in node.meta or "layer" not in node.meta:
                raise MoeccError(
                    f"node %{node.name} ({target_text(node.target)}) lacks meta 'val' or 'layer'; a pass must set both"
                )
            late = next(
                (i for i in node.all_input_nodes if i.meta["layer"] > node.meta["layer"]), None
            )
            if late is not None:
                raise MoeccError(
                    f"node %{node.name} in stage {node.meta['layer']} reads %{late.name} of stage {late.meta['layer']}"
                )
            if node.target in ops.MOE_OPS or node.target is ops.Q_LINEAR:
                self._verify_call(node)

    def _verify_weight(self, node: fx.Node) -> None:
        held = self.tensors._there.get(self.weights[node.name].name)
        if not isinstance(held, Tensor):  # on disk, checked when it was put there
            return
        val = node.meta["val"]
        name = self.weights[node.name].name
        if held.shape != val.shape or held.dtype != val.dtype:
            raise MoeccError(
                f"weight {name} is {type_text(held)} but its node says {type_text(val)}"
            )
        if found := nonfinite(held):
            raise MoeccError(f"weight {name} holds {found}")

    def _verify_call(self, node: fx.Node) -> None:
        values = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        mode = next(
            n.meta["val"].fake_mode
            for n in node.all_input_nodes
            if hasattr(n.meta["val"], "fake_mode")
        )
        try:
            with mode:
                node.target(*values[0], **values[1])  # type: ignore[operator]
            check_operands(node)
        except MoeccError:
            raise
        except Exception as e:
            raise MoeccError(
                f"node %{node.name} ({target_text(node.target)}) does not type-check: {e}"
            ) from e

    def text(self, stage: int | None = None) -> str:
        """The graph as people read it and tests compare it: one line per node, with shapes and a digest of held tensors.

        stage: only the nodes of this one and the weights that they read.
        """
        nodes = set(self.graph.nodes if stage is None else stage_nodes(self, stage))
        nodes |= {i for n in nodes for i in n.all_input_nodes if i.name in self.weights}
        return "".join(self.line(node) + "\n" for node in self.graph.nodes if node in nodes)

    def line(self, node: fx.Node) -> str:
        """A node's line of the text."""
        if node.op == "output":
            return f"return {arg_text(node.args[0])}"
        return f"%{node.name} : {type_text(node.meta.get('val'))} = {self._expression(node)}"

    def _expression(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            weight = self.weights.get(node.name)
            if weight is None:
                return "input"
            if weight.name in self.tensors:
                return f'held "{weight.name}" #{digest(self.tensors[weight.name])}'
            return f'{"derived" if weight.recipe else "weight"} "{weight.name}"'
        args = ", ".join(
            [*map(arg_text, node.args), *(f"{k}={arg_text(v)}" for k, v in node.kwargs.items())]
        )
        return f"{target_text(node.target)}({args})"

    # ---- leaving the IR

    def exported(self) -> ExportedProgram:
        """An ordinary torch.export program with every weight loaded: for torch.compile, torch.export.save and other tools."""
        module = copy_module(self.module)
        old = self.exported_from.graph_signature
        user = [s for s in old.input_specs if s.kind == InputKind.USER_INPUT]
        specs, state = [], {}
        for node in module.graph.nodes:
            if node.op == "placeholder" and node.name in self.weights:
                name = self.weights[node.name].name
                specs.append(InputSpec(InputKind.BUFFER, TensorArgument(node.name), name, True))
                state[name] = self.read(name)
        output = next(n for n in module.graph.nodes if n.op == "output")
        outputs = [copy.copy(s) for s in old.output_specs]
        for spec, value in zip(outputs, output.args[0], strict=True):
            if isinstance(value, fx.Node):
                spec.arg = TensorArgument(value.name)
        return ExportedProgram(
            root=module, graph=module.graph, graph_signature=ExportGraphSignature([*specs, *user], outputs), state_dict=state,
            range_constraints=self.exported_from.range_constraints,
            module_call_graph=copy.deepcopy(self.exported_from.module_call_graph[:1]),
            example_inputs=self.exported_from.example_inputs, constants={}, verifiers=self.exported_from.verifiers,
        )  # fmt: skip


def fold_weight_graphs(program: Program) -> None:
    """Turn every weight-only subgraph that feeds an experts node into one derived weight, so that operands are placeholders."""
    for moe in program.moe_layers():
        names, args = operand_names(moe.node), list(moe.node.args)
        for i, (name, value) in enumerate(zip(names, args, strict=False)):
            if i > 2 and isinstance(value, fx.Node) and value.op != "placeholder":
                args[i] = _derive(program, f"{moe.path}.{name}", value)
        moe.node.args = tuple(args)
    program.graph.eliminate_dead_code()
    program.drop_unused()


def _derive(program: Program, name: str, root: fx.Node) -> fx.Node:
    inside = ancestors([root])
    order = [n for n in program.graph.nodes if n in inside]
    leaves = [
        n
        for n in program.graph.nodes
        if n.op == "placeholder" and any(u in inside for u in n.users)
    ]
    if any(leaf.name not in program.weights for leaf in leaves):
        raise MoeccError(
            f"{name}: computed from the model's inputs, not from weights alone; this model can't be compiled"
        )
    recipe, mapping = fx.Graph(), {}
    for leaf in leaves:
        mapping[leaf] = recipe.placeholder(leaf.name)
    for node in order:
        mapping[node] = recipe.node_copy(node, lambda n: mapping[n])
    recipe.output(mapping[root])
    with program.graph.inserting_before(program.user_inputs[0]):
        new = program.graph.placeholder("w_" + name.replace(".", "_"))
    new.meta.update(val=root.meta["val"], layer=0, path="")
    sources = tuple(program.weights[leaf.name].name for leaf in leaves)
    program.weights[new.name] = Weight(name, fx.GraphModule(torch.nn.Module(), recipe), sources)
    return new


def output_node(program: Program) -> fx.Node:
    """The first result: logits, or the last hidden state of a model without a head."""
    result = next(n for n in program.graph.nodes if n.op == "output").args[0]
    node = result[0] if isinstance(result, (list, tuple)) else result
    assert isinstance(node, fx.Node)
    return node


def stage_nodes(program: Program, stage: int) -> list[fx.Node]:
    """The call nodes of one stage, in order."""
    return [n for n in program.graph.nodes if n.op == "call_function" and n.meta["layer"] == stage]
