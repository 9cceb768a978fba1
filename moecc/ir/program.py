"""The IR: a torch.fx graph in the moecc dialect, its weights, and the facts known about both.

A Program's graph is *lifted*: every parameter, buffer and constant is a placeholder; user inputs
come last. A placeholder stands for a `Weight`, one of
  plain      a tensor of the checkpoint, read from the store on demand;
  derived    a small graph over other weights (it makes a transposed or interleaved experts tensor
             canonical), computed when read;
  held       a tensor that tracing captured or a pass made (`Program.tensors`).
So a program of any size fits in memory, and a pass sees one canonical layout, whatever the
checkpoint's layout is.

A program computes on one device: what is read goes there, and what is held comes back to memory.

Every node has three entries in its metadata:
  val     its fake value;
  layer   its stage: 0 before the first decoder layer, i + 1 in decoder layer i, one more after the
          last; never smaller than the stage of an input;
  path    the path of its module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Protocol

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from moecc.errors import MoeccError
from moecc.ir import export, ops, text, verify
from moecc.ir.derived import derive, derive_experts
from moecc.ir.graph import copy_module
from moecc.ir.moe import MoE, Projection, router_logits
from moecc.ir.restriction import Restriction
from moecc.ir.tensors import CPU, Held, Reader, Store, Weight
from moecc.types import Config

__all__ = ["Program", "Resizer", "Weight", "output_node", "stage_nodes"]


class Resizer(Protocol):
    """Makes programs of the same model with fewer experts (`moecc.frontend.resize`)."""

    def groups(self, program: Program) -> int:
        """Return the number of groups from which the router chooses first."""

    def require(self, program: Program, counts: Mapping[str, int]) -> None:
        """Raise MoeccError if a layer cannot have so many experts (`counts`, by path)."""

    def resize(self, program: Program, keep: Mapping[str, Sequence[int]]) -> Program:
        """Return the program with only the experts `keep` (ascending) of layers, by path."""


@dataclass(eq=False)
class Program:
    """A model as passes see it."""

    module: fx.GraphModule
    weights: dict[str, Weight]  # by placeholder name
    tensors: Held  # held tensors by weight name
    store: Store | None
    # gives the pieces of a signature that torch.export wants back; its graph is not used
    exported_from: ExportedProgram
    config: Config = None
    source: str = ""
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU  # where its weights are read to and its nodes run
    restriction: Restriction = field(default_factory=Restriction)  # of the shapes it holds for
    unreached: tuple[str, ...] = ()  # parameters that no traced path reads
    # the facts that the passes so far have established (`moecc.pipeline.passes.Pass`)
    facts: set[str] = field(default_factory=set)
    # dotted entry of config.json -> its new value, if a pass changed the model's sizes
    config_edits: dict[str, object] = field(default_factory=dict)
    # held weights whose values the checkpoint's own type holds exactly
    rounded: set[str] = field(default_factory=set)
    # path of an MoE layer -> the source's numbers of its experts, if a pass removed some
    kept: dict[str, tuple[int, ...]] = field(default_factory=dict)
    resizer: Resizer | None = None  # makes the program with fewer experts

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def layers(self) -> int:
        """Number of stages: the decoder layers, the part before them and the part after them."""
        return 1 + max(int(n.meta["layer"]) for n in self.graph.nodes if n.op == "call_function")

    @property
    def user_inputs(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "placeholder" and n.name not in self.weights]

    def moe_layers(self) -> list[MoE]:
        """Return every experts node of the dialect, dense or compressed, in graph order."""
        found = [n for n in self.graph.nodes if n.op == "call_function" and n.target in ops.MOE_OPS]
        return [MoE(n, n.meta["path"], n.meta["layer"], router_logits(n)) for n in found]

    # ---- weights

    def read(self, name: str, *, experts: Sequence[int] | None = None) -> Tensor:
        """Return the tensor called `name` on the program's device and in its dtype.

        Integers keep their type. experts: the rows of [E, ...] to read. Raise MoeccError if there
        is no such weight.
        """
        return self._found(name, experts).to(self.device)

    def _found(self, name: str, experts: Sequence[int] | None) -> Tensor:
        """Return a tensor from wherever it is."""
        if name in self.tensors:
            return (
                self.tensors[name] if experts is None else self.tensors.reader(name).rows(experts)
            )
        derived = self._derived(name)
        if derived is not None:
            if experts is None:
                return derive(derived, self._read)
            return derive_experts(derived, self._read, experts)
        if self.store is None:
            why = "no weights, the program was traced from a config"
            raise MoeccError(f"{name}: {why}; give a checkpoint folder or hub id")
        if name not in self.store:
            why = f"not in the checkpoint {self.source}"
            raise MoeccError(f"{name}: {why}; give a complete checkpoint")
        return self.store.read(name, dtype=self.dtype, experts=experts)

    def _read(self, name: str, experts: Sequence[int] | None) -> Tensor:
        return self.read(name, experts=experts)

    def _derived(self, name: str) -> Weight | None:
        weights = self.weights.values()
        return next((w for w in weights if w.name == name and w.recipe is not None), None)

    def value(self, placeholder: fx.Node, experts: Sequence[int] | None = None) -> Tensor:
        """Return the tensor behind the placeholder of a weight, or its rows of some experts."""
        return self.read(self.weights[placeholder.name].name, experts=experts)

    def origins(self, name: str) -> tuple[str, ...]:
        """Return the model parameters that a weight is computed from; a plain one is its own."""
        derived = self._derived(name)
        return derived.sources if derived else (name,)

    def parameters_of(self, projection: Projection, *parts: str) -> list[str]:
        """Return the model parameters behind parts of a dense projection, each once.

        parts: as `Projection.operand` takes them; one that is absent has none.
        """
        nodes = [n for part in parts if (n := projection.operand(part)) is not None]
        return list(
            dict.fromkeys(s for n in nodes for s in self.origins(self.weights[n.name].name))
        )

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return a weight's type in the checkpoint; the program's own if it is not in there."""
        if self.store is None or name not in self.store:
            return self.dtype
        return self.store.dtype(name)

    # ---- rewriting

    def add(self, name: str, tensor: Tensor) -> fx.Node:
        """Hold `tensor` as the weight `name` and return its placeholder.

        If the name exists, every reader gets the new value, derived weights too; a weight of the
        checkpoint is then stored in the program's type (`rewrite` rounds it to the checkpoint's).
        Raise MoeccError if the weight is a derived one.
        """
        derived = self._derived(name)
        if derived is not None and (sources := derived.sources):
            advice = "that its new value" if len(sources) == 1 else "those their new values"
            raise MoeccError(f"{name} is computed from {', '.join(sources)}; give {advice}")
        self.tensors[name] = tensor
        return self._place(name, self._fake(self.tensors[name]))

    def add_reader(self, name: str, like: fx.Node, read: Reader) -> fx.Node:
        """Hold what `read` reads as the weight `name`, of the type and shape of a node's value."""
        self.tensors.spill(name, read.whole, read.some)
        return self._place(name, like.meta["val"])

    def _place(self, name: str, value: Tensor) -> fx.Node:
        """Return the placeholder of a held weight, whose fake value is now `value`."""
        self.rounded.discard(name)
        for node in self.graph.nodes:
            weight = self.weights.get(node.name) if node.op == "placeholder" else None
            if weight is not None and name in (weight.name, *weight.sources):
                if weight.name == name:
                    node.meta["val"] = value
                found: fx.Node = node
                return found
        with self.graph.inserting_before(self.user_inputs[0]):
            node = self.graph.placeholder("w_" + name.replace(".", "_"))
        node.meta.update(val=value, layer=0, path="")
        self.weights[node.name] = Weight(name)
        return node

    def _fake(self, tensor: Tensor) -> Tensor:
        values = (n.meta.get("val") for n in self.graph.nodes)
        mode = next(v.fake_mode for v in values if hasattr(v, "fake_mode"))
        fake: Tensor = mode.from_tensor(tensor.detach(), static_shapes=True)
        return fake

    def rewrite(self, name: str, value: Tensor) -> fx.Node:
        """Give a weight of the checkpoint a new value, rounded to the checkpoint's type.

        So it takes no more room than before.
        """
        node = self.add(name, value.to(self.stored_dtype(name)).to(self.dtype))
        self.rounded.add(name)
        return node

    def replace(
        self,
        node: fx.Node,
        target: fx.node.Target,
        args: tuple[fx.node.Argument, ...],
        kwargs: dict[str, fx.node.Argument],
    ) -> fx.Node:
        """Make `node` a call of `target` with a result of the same shape; drop unread weights.

        The node stays the same object with the same name, so that a rewritten program still lines
        up with its float reference.
        """
        node.target, node.args, node.kwargs = target, args, kwargs
        self.drop_unused()
        return node

    def drop_unused(self) -> None:
        """Remove the weights that no node reads, their placeholders and held tensors."""
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and node.name in self.weights and not node.users:
                name = self.weights.pop(node.name).name
                self.tensors.pop(name, None)
                self.graph.erase_node(node)

    def copy(self) -> Program:
        """Return the same program with its own graph; tensors and store are shared."""
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

    # ---- number of experts

    def expert_groups(self) -> int:
        """Return the number of groups of neighbouring experts from which the router chooses first.

        Each group must keep the same number of experts.
        """
        return 1 if self.resizer is None else self.resizer.groups(self)

    def require_experts(self, counts: Mapping[str, int]) -> None:
        """Raise MoeccError, with the possible numbers, if a layer cannot have so many experts.

        counts: number of experts by the layer's path.
        """
        if self.resizer is None:
            why = "the number of experts of this program can't change"
            raise MoeccError(f"{why}; trace it from a folder")
        self.resizer.require(self, counts)

    def keep_experts(self, keep: Mapping[str, Sequence[int]]) -> None:
        """Keep only the experts `keep` (ascending) of the layers named by path.

        Router, configuration and stored shapes follow: the program becomes the trace of the smaller
        model. Rewritten weights keep their new values. Raise MoeccError as `require_experts` does,
        and if a pass has coded experts or linears already.
        """
        experts = {m.path: m.sizes[0] for m in self.moe_layers()}
        for path, rows in keep.items():
            if list(rows) != sorted(set(rows) & set(range(experts.get(path, 0)))):
                there = f"ascending numbers of its {experts.get(path, 0)} experts"
                raise MoeccError(f"{path}: can't keep the experts {list(rows)}; give {there}")
        self.require_experts({path: len(rows) for path, rows in keep.items()})
        assert self.resizer is not None
        made = replace(self.resizer.resize(self, keep), device=self.device)
        for f in fields(self):
            setattr(self, f.name, getattr(made, f.name))

    # ---- checking, printing, leaving

    def verify(self) -> None:
        """Raise MoeccError, with node and shape, if the graph breaks a rule of the IR."""
        verify.verify(self.graph, self.weights, self.tensors)

    def text(self, stage: int | None = None) -> str:
        """Return the graph as text: one line per node, with shapes and digests of held tensors.

        stage: print only its nodes and the weights that they read.
        """
        nodes = set(self.graph.nodes if stage is None else stage_nodes(self, stage))
        nodes |= {i for n in nodes for i in n.all_input_nodes if i.name in self.weights}
        return "".join(self.line(node) + "\n" for node in self.graph.nodes if node in nodes)

    def line(self, node: fx.Node) -> str:
        """Return a node's line of the text."""
        return text.line(node, self.weights, self.tensors)

    def exported(self) -> ExportedProgram:
        """Return a torch.export program with all weights loaded, e.g. for torch.compile."""
        return export.exported(self.module, self.weights, self.read, self.exported_from)


def output_node(program: Program) -> fx.Node:
    """Return the first result: logits, or the last hidden state of a model without a head."""
    result = next(n for n in program.graph.nodes if n.op == "output").args[0]
    node = result[0] if isinstance(result, (list, tuple)) else result
    assert isinstance(node, fx.Node)
    return node


def stage_nodes(program: Program, stage: int) -> list[fx.Node]:
    """Return the call nodes of one stage, in graph order."""
    return [n for n in program.graph.nodes if n.op == "call_function" and n.meta["layer"] == stage]
