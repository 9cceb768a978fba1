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
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument

from moecc import ops, vq4
from moecc.errors import MoeccError
from moecc.gates import rows_per_unit

_SHORT = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
}  # fmt: skip


class Store(Protocol):
    """Where plain weights come from (`moecc.weights`)."""

    def __contains__(self, name: object) -> bool: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, name: str, *, dtype: torch.dtype | None = None, experts: Sequence[int] | None = None) -> Tensor: ...


class Held(MutableMapping[str, Tensor]):
    """Held tensors by name. One may be spilled: it stays on disk and is read each time it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor] | None = None):
        self._there: dict[str, Tensor | Callable[[], Tensor]] = (
            dict(tensors._there) if isinstance(tensors, Held) else dict(tensors or {})
        )

    def __getitem__(self, name: str) -> Tensor:
        held = self._there[name]
        return held if isinstance(held, Tensor) else held()

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._there[name] = tensor

    def __delitem__(self, name: str) -> None:
        del self._there[name]

    def __contains__(self, name: object) -> bool:
        return name in self._there

    def __iter__(self) -> Iterator[str]:
        return iter(self._there)

    def __len__(self) -> int:
        return len(self._there)

    def same(self, other: Held, name: str) -> bool:
        """Whether both hold what was put there once under `name`; nothing is read for it."""
        return self._there.get(name) is other._there.get(name)

    def pop(self, name: str, default: Any = None) -> Any:
        """Forget a tensor; one that was spilled is not read for it."""
        return self._there.pop(name, default)

    def reader(self, name: str) -> Callable[[], Tensor]:
        """What gives a tensor, without reading it now."""
        held = self._there[name]
        return (lambda: held) if isinstance(held, Tensor) else held

    def spill(self, name: str, read: Callable[[], Tensor]) -> None:
        """Drop the tensor called `name` from memory; `read` gives it again, or another in its place."""
        self._there[name] = read


@dataclass(frozen=True)
class Weight:
    """What a placeholder stands for: `name`, and for a derived weight the graph that computes it from `sources`."""

    name: str
    recipe: fx.GraphModule | None = None
    sources: tuple[str, ...] = ()


@dataclass(eq=False)
class MoE:
    """One experts node and the names around it. `path` is the experts module's, `logits` the router's last linear."""

    node: fx.Node
    path: str
    layer: int
    logits: fx.Node | None

    @property
    def top_k(self) -> int:
        return int(self.node.args[1].meta["val"].shape[1])  # type: ignore[union-attr]

    @property
    def attributes(self) -> dict[str, Any]:
        return dict(self.node.kwargs)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """E experts, N rows of gate_up, D hidden, F intermediate."""
        first = self.operand("gate_up_scale" if self.node.target is ops.VQ_EXPERTS else "gate_up")
        experts, rows = (int(n) for n in first.meta["val"].shape[:2])  # type: ignore[union-attr]
        hidden = int(self.node.args[0].meta["val"].shape[1])  # type: ignore[union-attr]
        return experts, rows, hidden, rows // rows_per_unit(self.node.kwargs["gate"])  # type: ignore[arg-type]

    def operand(self, name: str) -> fx.Node | None:
        """The operand called `name` in the op's schema, None where it is absent."""
        return operand(self.node, name)

    def set_operands(self, values: Mapping[str, fx.Node | None]) -> None:
        """Give operands by name other placeholders, or take them out (None)."""
        names, args = operand_names(self.node), list(self.node.args)
        for name, value in values.items():
            args[names.index(name)] = value
        self.node.args = tuple(args)


def operand_names(node: fx.Node) -> list[str]:
    """The tensors of a call of the dialect, in order."""
    return [a.name for a in node.target._schema.arguments if not a.kwarg_only]  # type: ignore[union-attr]


def operand(node: fx.Node, name: str) -> fx.Node | None:
    position = operand_names(node).index(name)
    value = node.args[position] if position < len(node.args) else None
    return value if isinstance(value, fx.Node) else None


@dataclass(eq=False)
class Program:
    """A model as passes see it. `facts` are what the passes so far have established (`moecc.base.Pass`)."""

    module: fx.GraphModule
    weights: dict[str, Weight]  # placeholder name -> what it stands for
    tensors: Held  # held tensors by weight name
    store: Store | None
    exported_from: ExportedProgram  # signature pieces that torch.export wants back; its graph is not used
    config: Any = None
    source: str = ""
    dtype: torch.dtype = torch.float32
    restriction: str = ""  # a limit on input shapes that the trace had to accept
    unreached: tuple[str, ...] = ()  # parameters that no traced path reads
    facts: set[str] = field(default_factory=set)
    rounded: set[str] = field(default_factory=set)  # held weights whose values the checkpoint's own type holds exactly

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
        derived = next((w for w in self.weights.values() if w.name == name and w.recipe is not None), None)
        if derived is not None and derived.recipe is not None:
            with torch.no_grad():
                value: Tensor = derived.recipe(*[self.read(s) for s in derived.sources])
            return value.contiguous() if experts is None else value[list(experts)]
        if self.store is None:
            raise MoeccError(
                f"{name}: no weights, the program was traced from a config; give a checkpoint folder or hub id"
            )
        if name not in self.store:
            raise MoeccError(f"{name}: not in the checkpoint {self.source}; give a complete checkpoint")
        return self.store.read(name, dtype=self.dtype, experts=experts)

    def value(self, placeholder: fx.Node) -> Tensor:
        """The tensor that a placeholder of a weight stands for."""
        return self.read(self.weights[placeholder.name].name)

    def origins(self, name: str) -> tuple[str, ...]:
        """The model parameters that the weight called `name` is computed from (itself where it is plain)."""
        derived = next((w for w in self.weights.values() if w.name == name and w.recipe is not None), None)
        return derived.sources if derived else (name,)

    def stored_dtype(self, name: str) -> torch.dtype:
        """The type that the checkpoint stores a weight in, the program's own where it has no such weight."""
        return self.dtype if self.store is None or name not in self.store else self.store.dtype(name)

    # ---- rewriting

    def add(self, name: str, tensor: Tensor) -> fx.Node:
        """A new held weight and its placeholder; an existing name is given its new value, where a derived weight reads it too.

        A weight of the checkpoint is stored in the program's type then; `rewrite` rounds it to the checkpoint's.
        """
        if sources := next((w.sources for w in self.weights.values() if w.name == name and w.recipe is not None), None):
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

    def replace(self, node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
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

    def copy(self) -> Program:
        """The same program with a graph of its own; tensors and store are shared."""
        return Program(
            copy_module(self.module), dict(self.weights), Held(self.tensors), self.store, self.exported_from, self.config,
            self.source, self.dtype, self.restriction, self.unreached, set(self.facts), set(self.rounded),
        )  # fmt: skip

    def _fake(self, tensor: Tensor) -> Tensor:
        mode = next(n.meta["val"].fake_mode for n in self.graph.nodes if hasattr(n.meta.get("val"), "fake_mode"))
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
                    f"node %{node.name} ({_target(node.target)}) lacks meta 'val' or 'layer'; a pass must set both"
                )
            late = next((i for i in node.all_input_nodes if i.meta["layer"] > node.meta["layer"]), None)
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
            raise MoeccError(f"weight {name} is {_type(held)} but its node says {_type(val)}")
        if found := nonfinite(held):
            raise MoeccError(f"weight {name} holds {found}")

    def _verify_call(self, node: fx.Node) -> None:
        values = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        mode = next(n.meta["val"].fake_mode for n in node.all_input_nodes if hasattr(n.meta["val"], "fake_mode"))
        try:
            with mode:
                node.target(*values[0], **values[1])  # type: ignore[operator]
            check_operands(node)
        except MoeccError:
            raise
        except Exception as e:
            raise MoeccError(f"node %{node.name} ({_target(node.target)}) does not type-check: {e}") from e

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
            return f"return {_arg(node.args[0])}"
        return f"%{node.name} : {_type(node.meta.get('val'))} = {self._expression(node)}"

    def _expression(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            weight = self.weights.get(node.name)
            if weight is None:
                return "input"
            if weight.name in self.tensors:
                return f'held "{weight.name}" #{digest(self.tensors[weight.name])}'
            return f'{"derived" if weight.recipe else "weight"} "{weight.name}"'
        args = ", ".join([*map(_arg, node.args), *(f"{k}={_arg(v)}" for k, v in node.kwargs.items())])
        return f"{_target(node.target)}({args})"

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


def copy_module(module: fx.GraphModule) -> fx.GraphModule:
    """A GraphModule with its own graph; node metadata is shared value by value (fake tensors are not cloned)."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        new = graph.node_copy(node, lambda n: mapping[n])
        new.meta = dict(node.meta)
        if new.name != node.name:
            new._rename(node.name)
        mapping[node] = new
    return fx.GraphModule(module, graph)


def check_operands(node: fx.Node) -> None:
    """Shapes of an experts node's weights against each other; MoeccError names node, operand and shape."""
    if node.target is ops.Q_LINEAR:
        return
    val = {name: operand(node, name) for name in operand_names(node)}
    shape = {k: tuple(v.meta["val"].shape) for k, v in val.items() if isinstance(v, fx.Node)}
    experts, rows, hidden, intermediate = MoE(node, "", 0, None).sizes
    expected: dict[str, tuple[int, ...]] = {
        "gate_up": (experts, rows, hidden), "down": (experts, hidden, intermediate), "gate_up_bias": (experts, rows),
        "down_bias": (experts, hidden), "gate_up_scale": (experts, rows), "down_scale": (experts, hidden),
        "gate_up_slope": (experts, rows), "gate_up_offset": (experts, rows), "down_slope": (experts, hidden),
        "down_offset": (experts, hidden), "post_norm": (hidden,),
    }  # fmt: skip
    for projection, n, k, input_side in (("gate_up", rows, hidden, True), ("down", hidden, intermediate, False)):
        own = {t: shape[f"{projection}_{t}"] for t in vq4.TENSORS if f"{projection}_{t}" in shape}
        for whole in (vq4.SHARED[:3], [vq4.MEAN + t for t in vq4.CODED if t != "signs"]):
            missing = [t for t in whole if t not in own]
            if 0 < len(missing) < len(whole):
                present = next(t for t in whole if t in own)
                raise MoeccError(
                    f"node %{node.name} ({_target(node.target)}): {projection}_{present} without {projection}_{missing[0]}"
                )
        expected.update(
            {f"{projection}_{t}": s for t, s in _stored_shapes(own, experts, n, k, hidden, input_side).items()}
        )
    for name, want in expected.items():
        if name in shape and shape[name] != want:
            raise MoeccError(f"node %{node.name} ({_target(node.target)}): {name} is {shape[name]}, expected {want}")
    for name, node_of in val.items() if node.target is ops.VQ_EXPERTS else ():
        kind = name.removeprefix("gate_up_").removeprefix("down_").removeprefix(vq4.MEAN)
        if kind in vq4.DTYPES and isinstance(node_of, fx.Node) and node_of.meta["val"].dtype not in vq4.DTYPES[kind]:
            want_type = " or ".join(_SHORT[d] for d in vq4.DTYPES[kind])
            raise MoeccError(
                f"node %{node.name} ({_target(node.target)}): {name} is {_type(node_of.meta['val'])}, expected {want_type}"
            )


def _stored_shapes(
    own: dict[str, tuple[int, ...]], experts: int, rows: int, columns: int, hidden: int, input_side: bool
) -> dict[str, tuple[int, ...]]:
    """What codes, signs, codebook, basis and coefficients of one projection must look like, given the others."""
    expected: dict[str, tuple[int, ...]] = {}
    if "codebook" in own:
        books, v = own["codebook"][0], own["codebook"][-1]
        expected["codebook"] = (books if books in (1, experts) else experts, vq4.CODEBOOK_SIZE, v if v in (2, 4) else 4)
        expected["codes"] = (experts, rows, vq4.padded(columns) // expected["codebook"][2])
        expected["signs"] = (experts, rows, vq4.padded(columns) // 8)
    if "basis" in own:
        rank = own["basis"][0]
        expected["basis"] = (rank, hidden)
        expected["coef"] = (experts, rows, rank) if input_side else (experts, rank, columns)
        expected["coef_scale"] = expected["coef"][:2]
    mean = {t.removeprefix(vq4.MEAN): s for t, s in own.items() if t.startswith(vq4.MEAN)}
    if mean:
        expected[vq4.MEAN + "scale"] = (1, rows)
        for t, s in _stored_shapes(mean, 1, rows, columns, hidden, input_side).items():
            expected[vq4.MEAN + t] = s
    return expected


def router_logits(experts: fx.Node) -> fx.Node | None:
    """The router's last linear: walk back from the chosen indices to the nearest linear that the experts' input does not need.

    Where scores multiply the experts' input (llama4) it does need it; then the nearest linear with a row per expert.
    """
    found = _nearest_linear(experts.args[1], ancestors([experts.args[0]]))  # type: ignore[list-item]
    if found is None:
        found = _nearest_linear(experts.args[1], set())
        count = experts.args[3].meta["val"].shape[0]  # type: ignore[union-attr]
        found = found if found is not None and found.meta["val"].shape[-1] == count else None
    return found


def _nearest_linear(start: Any, avoid: set[fx.Node]) -> fx.Node | None:
    frontier, seen = [start], set()
    while frontier:
        node = max(frontier)
        frontier.remove(node)
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.op == "call_function" and node not in avoid:
            if "linear" in _target(node.target) or _target(node.target) in {"aten.mm", "aten.addmm", "aten.matmul"}:
                return node
        frontier += [i for i in node.all_input_nodes if i.op == "call_function" and i not in avoid]
    return None


def ancestors(roots: Iterable[fx.Node]) -> set[fx.Node]:
    """The call nodes that `roots` are computed from, themselves included."""
    seen: set[fx.Node] = set()
    stack = [r for r in roots if isinstance(r, fx.Node)]
    while stack:
        node = stack.pop()
        if node.op == "call_function" and node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    return seen


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
    leaves = [n for n in program.graph.nodes if n.op == "placeholder" and any(u in inside for u in n.users)]
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


def digest(tensor: Tensor) -> str:
    """Eight hexadecimal digits of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)  # torch 2.11 views no scalar as bytes
    raw = flat.view(torch.uint8).numpy()
    return hashlib.sha256(raw.tobytes()).hexdigest()[:8]


def nonfinite(tensor: Tensor) -> str:
    """How many NaN and infinite values a float tensor holds, in words; empty where there are none."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.dtype.itemsize == 1:
        return ""
    low, high = tensor.detach().aminmax()  # both are NaN if any element is; no temporary of the tensor's size
    if bool(torch.isfinite(low)) and bool(torch.isfinite(high)):
        return ""
    nan, inf = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
    return f"{nan} NaN and {inf} infinite values of {tensor.numel()}"


def stage_nodes(program: Program, stage: int) -> list[fx.Node]:
    """The call nodes of one stage, in order."""
    return [n for n in program.graph.nodes if n.op == "call_function" and n.meta["layer"] == stage]


def needed_for(nodes: Iterable[fx.Node], wanted: set[str]) -> list[fx.Node]:
    """Those of `nodes` (in order) that the values called `wanted` depend on, in order.

    An in-place op counts where a needed node, or the caller, reads what it writes into, though nobody reads its own result.
    """
    needed: set[fx.Node] = set()
    order = list(nodes)
    for node in reversed(order):
        into = written(node)
        if (
            node.name in wanted
            or any(u in needed for u in node.users)
            or any(i.name in wanted or any(u in needed for u in i.users) for i in into)
        ):
            needed.add(node)
    return [n for n in order if n in needed]


def descendants(nodes: Sequence[fx.Node], roots: Iterable[fx.Node]) -> set[fx.Node]:
    """Nodes whose values depend on `roots`, through what is written in place too."""
    found, before = set(roots), 0
    while len(found) > before:
        before = len(found)
        for node in nodes:
            if node in found or any(i in found for i in node.all_input_nodes):
                found.update((node, *written(node)))
    return found


def written(node: fx.Node) -> list[fx.Node]:
    """The nodes whose storage an in-place op changes: its first argument and what that is a view of."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return []
    found = [node.args[0]] if node.args and isinstance(node.args[0], fx.Node) else []
    while found and _is_view(found[-1]) and isinstance(found[-1].args[0], fx.Node):
        found.append(found[-1].args[0])
    return [f for f in found if isinstance(f, fx.Node)]


def _is_view(node: Any) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(r.alias_info is not None for r in node.target._schema.returns)


def run_nodes(
    nodes: Iterable[fx.Node],
    values: dict[str, Any],
    weight: Mapping[str, Any],
    keep: set[str] | None = None,
) -> Iterator[tuple[fx.Node, Any]]:
    """Evaluate `nodes` in order; `values` (by node name) is read and extended, `weight` gives placeholders. Yields each result.

    With `keep`, a value is dropped after its last use among `nodes` unless its name is in `keep`.
    """
    nodes = list(nodes)
    last: dict[str, fx.Node] = {}
    if keep is not None:
        for node in nodes:
            for i in node.all_input_nodes:
                last[i.name] = node

    def value(n: fx.Node) -> Any:
        if n.op == "get_attr":  # a constant of the graph that is no tensor, such as a mask function's tree
            return getattr(n.graph.owning_module, str(n.target))
        return values[n.name] if n.name in values else weight[n.name]

    for node in nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        target: Any = node.target
        if torch.is_grad_enabled():
            target = ops.REFERENCE.get(target, target)
        try:
            result = target(*args, **kwargs)
        except (RuntimeError, IndexError, TypeError) as e:
            raise MoeccError(
                f"node %{node.name} ({_target(node.target)}) in stage {node.meta['layer']} failed: {e}"
            ) from e
        values[node.name] = result
        yield node, result
        if keep is not None:
            for i in node.all_input_nodes:
                if last[i.name] is node and i.name not in keep:
                    values.pop(i.name, None)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{_SHORT.get(value.dtype, str(value.dtype))}[{', '.join(map(str, value.shape))}]"
    return "(" + ", ".join(map(_type, value)) + ")" if isinstance(value, (list, tuple)) else str(value)


def _arg(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_arg, value)) + "]"
    return f"%{value.name}" if isinstance(value, fx.Node) else str(value)


def _target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return getattr(target, "__name__", str(target))
