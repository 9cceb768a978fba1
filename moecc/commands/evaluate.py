"""`moecc eval`: how far a compiled program is from its reference, on text that neither has seen.

  1. Both programs take the same token rows, one decoder layer at a time, the reference first. At
     most one layer's weights are in memory, plus the activations between two layers.
  2. At every experts node the chosen sets and the outputs are compared. Each program sees its own
     hidden states (teacher-forced on the text, not on the other's activations), so the numbers of a
     layer include what earlier layers did to its input.
  3. Behind the last layer logits exist for one batch at a time. Their log-probabilities give
     perplexity and KL.

Shapes: B rows of S tokens, V vocabulary, T = B S tokens at an experts node, k experts per token,
D hidden. Perplexity is exp of the mean negative log-likelihood of tokens 2..S of each row. KL is
KL(reference || program) at the same S - 1 positions, mean, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, fx

from moecc.artifact.schema import number_experts, read_manifest
from moecc.checkpoint.schema import METHODS
from moecc.checkpoint.source import adapter_beside, checkpoint_folder
from moecc.commands.agreement import LayerAgreement, LayerSums, Totals
from moecc.commands.rows import require_rows, rows_digest, token_rows, tokenizer_of
from moecc.errors import MoeccError, printable_lines
from moecc.frontend.config import as_if_plain, quantization_method, text_config
from moecc.frontend.skeleton import bare
from moecc.frontend.trace import trace
from moecc.ir.graph import run_nodes
from moecc.ir.moe import MoE
from moecc.ir.program import Program, output_node, stage_nodes
from moecc.pipeline.bits import everything_bits, experts_bits
from moecc.pipeline.device import device_called, repeatable
from moecc.pipeline.stream import StageWeights, Stream
from moecc.types import Json, Progress, Say

_OTHER_MODEL = "give the model that it was compiled from as reference"
_LOGITS_AT_ONCE = 1 << 27  # logits of one batch and one program: 512 MiB in float32


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    kl: in nats per predicted token. agreement, exact_agreement: over all layers. tokens: predicted
    ones. Bits are per weight that is left; experts_left: the share of the reference's routed-expert
    weights that is, 1 if none were pruned.
    """

    perplexity: float
    reference_perplexity: float
    kl: float
    agreement: float
    exact_agreement: float
    tokens: int
    bits_per_weight_experts: float
    bits_per_weight: float
    per_layer: tuple[LayerAgreement, ...]
    experts_left: float = 1.0

    def as_dict(self) -> Json:
        """Return plain numbers, lists and dicts, for --json."""
        return {**asdict(self), "per_layer": [asdict(layer) for layer in self.per_layer]}


def evaluate(
    program: Program,
    reference: Program,
    rows: Tensor,
    *,
    batch: int = 8,
    progress: Progress = lambda items, label: items,
) -> Evaluation:
    """Compare `program` with `reference` on token rows i64 [count, S], at most `batch` at a time.

    Raise MoeccError if they cannot be compared.
    """
    pairs = _check(program, reference, rows)
    most = _LOGITS_AT_ONCE // (rows.shape[1] * _width(reference))
    batches = list(torch.split(rows, max(1, min(batch, most))))
    ours = _Side(program, [p for p, _ in pairs], batches)
    theirs = _Side(reference, [r for _, r in pairs], batches)
    layers = [LayerSums(r.path) for _, r in pairs]
    totals = Totals()
    for stage in progress(range(reference.layers), "evaluating layers"):
        if stage < reference.layers - 1:
            theirs.advance()
            ours.advance()
        else:
            _last_stage(ours, theirs, batches, totals)
        for (p, r), layer in zip(pairs, layers, strict=True):
            if r.layer == stage:
                layer.add(ours.pop(p), theirs.pop(r))
    return _evaluation(totals, layers, program, reference)


def evaluate_models(
    model: str,
    reference: str,
    *,
    text: Path | Sequence[Path] | None = None,
    rows: int = 64,
    length: int = 512,
    batch: int = 8,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress = lambda items, label: items,
    say: Say = print,
) -> Json:
    """Return what `moecc eval --json` prints of the artifact or checkpoint `model`.

    model, reference: folders or hub ids. text: files (`texts`); the default is text that comes with
    Python.
    rows, length: the rows that are taken and the tokens of each. batch: rows computed together.
    device: what computes, by `device_called`. Raise MoeccError if the two cannot be compared.
    """
    where = device_called(device)
    folder, original = checkpoint_folder(model), checkpoint_folder(reference)
    tokenizer = tokenizer_of(original, trust_remote_code=trust_remote_code)
    ids = token_rows(tokenizer, text, count=rows, length=length, purpose="evaluation", say=say)
    if read_manifest(folder).get("calibration_digest") == rows_digest(ids):
        say(f"note: {model} was calibrated on these very rows; they say little about others")
    programs = [_traced(path, where, say) for path in (folder, original)]
    if restriction := programs[1].restriction:
        say(f"note: the trace holds for {restriction} only")
    with repeatable(where):
        found = evaluate(programs[0], programs[1], ids, batch=batch, progress=progress)
    return {
        "model": model,
        "reference": reference,
        "rows": len(ids),
        "length": ids.shape[1],
        "rows_digest": rows_digest(ids),
        **found.as_dict(),
    }


def _traced(folder: Path, device: torch.device, say: Say) -> Program:
    say(f"tracing {folder}")
    if left := adapter_beside(folder):
        say(f"note: {folder}: {left}")
    program = replace(trace(folder, dtype=torch.float32), device=device)
    assert program.store is not None
    program.store.check()
    number_experts(program, folder)
    return program


def table(found: Json) -> str:
    """Return what `moecc eval` prints without --json."""
    perplexity, reference = found["perplexity"], found["reference_perplexity"]
    same, exact = 100 * found["agreement"], 100 * found["exact_agreement"]
    experts, everything = found["bits_per_weight_experts"], found["bits_per_weight"]
    lines = [
        f"perplexity      {perplexity:.4f}   reference {reference:.4f}",
        f"KL              {found['kl']:z.5f} nats per token, over {found['tokens']} tokens",
        f"experts chosen  {same:.2f} % the same, whole set {exact:.2f} %",
        f"bits per weight {experts:.3f} over routed experts, {everything:.3f} over everything",
    ]
    if found["experts_left"] < 1:
        share = f"{100 * found['experts_left']:.2f} %"
        lines.append(f"weights left    {share} of the routed experts' weights; bits are per these")
    lines.append("")
    width = max(len(row["path"]) for row in found["per_layer"])
    lines.append(f"{'layer':<{width}}  same experts  whole set  output error")
    for row in found["per_layer"]:
        chosen = f"{100 * row['agreement']:10.2f} %  {100 * row['exact_agreement']:7.2f} %"
        lines.append(f"{row['path']:<{width}}  {chosen}  {row['output_error']:12.5f}")
    return printable_lines(lines)


def _evaluation(
    totals: Totals, layers: list[LayerSums], program: Program, reference: Program
) -> Evaluation:
    nll, reference_nll, kl = (
        float(x) / totals.tokens for x in (totals.nll, totals.reference_nll, totals.kl)
    )
    for name, value in (("the reference", reference_nll), ("the compiled program", nll)):
        if math.isnan(value):
            raise MoeccError(
                f"{name} computes logits that are not numbers (NaN); "
                "its weights or dtype don't hold this model"
            )
    return Evaluation(
        perplexity=_exp(nll),
        reference_perplexity=_exp(reference_nll),
        kl=kl,
        agreement=sum(s.same for s in layers) / sum(s.slots for s in layers),
        exact_agreement=sum(s.exact for s in layers) / sum(s.tokens for s in layers),
        tokens=totals.tokens,
        bits_per_weight_experts=experts_bits(program),
        bits_per_weight=everything_bits(program, reference, _weights(program)),
        per_layer=tuple(s.layer() for s in layers),
        experts_left=_left(program, reference),
    )


def _weights(program: Program) -> int | None:
    """Return the number of weights that a program stands for, without those that were pruned.

    None if it has no weights.
    """
    store = program.store
    if store is None:
        return None
    if quantization_method(program.config) not in METHODS:
        return sum(math.prod(store.shape(n)) for n in store.names() if n not in store.tied)
    plain = bare(as_if_plain(program.config)).model.state_dict()
    return sum(int(t.numel()) for name, t in plain.items() if name not in store.tied)


def _left(program: Program, reference: Program) -> float:
    """Return the share of the reference's routed-expert weights that pruning has left."""
    ours, theirs = (sum(m.weights for m in p.moe_layers()) for p in (program, reference))
    return ours / theirs


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))  # a broken model still has a number


# ---------------------------------------------------------------- checks


def _check(program: Program, reference: Program, rows: Tensor) -> list[tuple[MoE, MoE]]:
    """Return the MoE layers of both in pairs; raise MoeccError if the two cannot be compared."""
    _check_head(reference, "the reference")
    _check_head(program, "the compiled program")
    ours, theirs = program.moe_layers(), reference.moe_layers()
    if len(ours) != len(theirs) or program.layers != reference.layers:
        raise MoeccError(
            f"the compiled program has {len(ours)} MoE layers in {program.layers} stages, "
            f"the reference {len(theirs)} in {reference.layers}; {_OTHER_MODEL}"
        )
    if _width(program) != _width(reference):
        raise MoeccError(
            f"the compiled program has a vocabulary of {_width(program)}, "
            f"the reference of {_width(reference)}; {_OTHER_MODEL}"
        )
    if rows.dim() != 2 or rows.shape[0] < 1 or rows.shape[1] < 2 or rows.dtype != torch.int64:
        raise MoeccError(
            f"token rows must be i64 [1 or more, 2 or more], not {rows.dtype} {list(rows.shape)}"
        )
    for side in (program, reference):
        require_rows(side, rows)
    pairs = _pairs(ours, theirs)
    for p, r in pairs:
        _check_layer(program, p, reference, r)
    return pairs


def _pairs(ours: list[MoE], theirs: list[MoE]) -> list[tuple[MoE, MoE]]:
    """Pair layers by path if both programs have the same paths, else in order."""
    by_path = {m.path: m for m in ours}
    if by_path.keys() == {r.path for r in theirs}:
        return [(by_path[r.path], r) for r in theirs]
    return list(zip(ours, theirs, strict=True))


def _check_layer(program: Program, p: MoE, reference: Program, r: MoE) -> None:
    if p.top_k != r.top_k or p.layer != r.layer:
        raise MoeccError(
            f"{r.path}: the reference chooses {r.top_k} experts, "
            f"the compiled program {p.top_k}; {_OTHER_MODEL}"
        )
    ours, theirs = _kept(program, p), _kept(reference, r)
    if not set(ours) <= set(theirs):
        raise MoeccError(
            f"{r.path}: the reference lacks experts that the compiled program has; {_OTHER_MODEL}"
        )
    if len(ours) < len(theirs) and not program.kept:
        raise MoeccError(
            f"{r.path}: the reference has {len(theirs)} experts, the compiled program {len(ours)}, "
            f"and nothing says which; {_OTHER_MODEL}"
        )


def _kept(program: Program, moe: MoE) -> tuple[int, ...]:
    """Return the source's numbers of a layer's experts."""
    return program.kept.get(moe.path, tuple(range(moe.sizes[0])))


def _width(program: Program) -> int:
    """Return the number of values per token that a program ends in."""
    return int(output_node(program).meta["val"].shape[-1])


def _check_head(program: Program, what: str) -> None:
    config = text_config(program.config)
    vocabulary, hidden = getattr(config, "vocab_size", None), getattr(config, "hidden_size", None)
    width = _width(program)
    # A head may be padded beyond the vocabulary, but a model without one ends in hidden states.
    if isinstance(vocabulary, int) and (
        width < vocabulary or (width != vocabulary and width == hidden)
    ):
        raise MoeccError(
            f"{what} ends in {width} values per token, not in logits over {vocabulary}; "
            "perplexity needs a causal language model with its head"
        )


# ---------------------------------------------------------------- one program in its layers


class _Side:
    """A program's stream, and the chosen experts and output of each experts node and batch."""

    def __init__(self, program: Program, moes: list[MoE], batches: list[Tensor]):
        self.program, self.stream = program, Stream(program, batches)
        self.wanted = {node.name for m in moes for node in (*_routing(m), m.node)}
        self.seen: dict[tuple[str, int], Tensor] = {}

    def visit(self, node: fx.Node, value: object, batch: int) -> None:
        if node.name in self.wanted:
            assert isinstance(value, Tensor)
            self.seen[node.name, batch] = value

    def advance(self) -> None:
        self.stream.advance(self.visit)

    def pop(self, moe: MoE) -> list[tuple[Tensor, Tensor]]:
        """Return (chosen experts i64 [T, k], output [T, D]) per batch, and forget them.

        Experts are numbered as in the source, whatever a pass has taken out of it. A slot without a
        weight is -1.
        """
        found = []
        kept = torch.tensor(self.program.kept[moe.path]) if moe.path in self.program.kept else None
        for b in range(len(self.stream.values)):
            index, weight, y = (
                self.seen.pop((node.name, b)) for node in (*_routing(moe), moe.node)
            )
            if kept is not None:
                index = kept.to(index.device)[index]
            found.append((torch.where(weight != 0, index, -1), y))
        return found

    @torch.no_grad()
    def logits(self, batch: int, weights: StageWeights) -> Tensor:
        """Run the last stage for one batch, drop its activations, and return logits [B, S, V]."""
        assert self.stream.stage == self.program.layers - 1, "logits come behind the last layer"
        output, nodes = output_node(self.program), stage_nodes(self.program, self.stream.stage)
        values, self.stream.values[batch] = self.stream.values[batch], {}
        for node, value in run_nodes(nodes, values, weights, keep={output.name}):
            self.visit(node, value, batch)
        return cast(Tensor, values[output.name])


def _routing(moe: MoE) -> tuple[fx.Node, fx.Node]:
    """Return the nodes of topk_index and of the routing weights."""
    return cast(tuple[fx.Node, fx.Node], moe.node.args[1:3])


def _last_stage(ours: _Side, theirs: _Side, batches: list[Tensor], totals: Totals) -> None:
    weights, reference_weights = StageWeights(ours.program), StageWeights(theirs.program)
    for batch, ids in enumerate(batches):
        totals.add(ours.logits(batch, weights), theirs.logits(batch, reference_weights), ids)
