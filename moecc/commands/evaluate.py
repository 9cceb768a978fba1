"""How far a compiled program is from its reference, on text that neither has seen.

  1. Both programs take the same token rows, one decoder layer at a time, the reference first: at most one layer's
     weights are in memory, plus the activations between two layers.
  2. At every experts node the chosen sets are compared, and the relative squared error of the node's output is taken.
     Each program sees its own hidden states (teacher-forced on the text, not on the other's activations), so the
     numbers of a layer include what earlier layers did to its input.
  3. Behind the last layer logits exist for one batch at a time: their log-probabilities give perplexity and KL.

Shapes: B rows of S tokens, V vocabulary, T = B S tokens at an experts node, k experts per token, D hidden.
Perplexity is exp of the mean negative log-likelihood of tokens 2..S of each row; KL is KL(reference || program) at the
same S - 1 positions, mean, in nats. All sums are kept in float64.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx

from moecc.checkpoint.source import checkpoint_folder
from moecc.commands.rows import require_rows, rows_digest, token_rows, tokenizer_of
from moecc.errors import MoeccError
from moecc.frontend.config import text_config
from moecc.frontend.trace import trace
from moecc.ir.graph import run_nodes
from moecc.ir.moe import MoE
from moecc.ir.program import Program, output_node, stage_nodes
from moecc.pipeline.bits import everything_bits, experts_bits
from moecc.pipeline.stream import StageWeights, Stream
from moecc.types import Json, Progress, Say

_OTHER_MODEL = "give the model that it was compiled from as reference"
_LOGITS_AT_ONCE = 1 << 27  # logits of one batch and one program: 512 MiB in float32
_PROBABILITIES_AT_ONCE = 1 << 24  # of which log-probabilities are taken together


@dataclass(frozen=True)
class LayerAgreement:
    """One MoE layer.

    agreement: share of the top-k experts that both chose; exact_agreement: share of tokens with the same set;
    output_error: squared error of the experts' output relative to the squared norm of the reference's.
    """

    path: str
    agreement: float
    exact_agreement: float
    output_error: float


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found. kl in nats per predicted token; agreement over all layers; tokens: predicted ones."""

    perplexity: float
    reference_perplexity: float
    kl: float
    agreement: float
    exact_agreement: float
    tokens: int
    bits_per_weight_experts: float
    bits_per_weight: float
    per_layer: tuple[LayerAgreement, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts, for --json."""
        return {**asdict(self), "per_layer": [asdict(layer) for layer in self.per_layer]}


def evaluate(
    program: Program,
    reference: Program,
    rows: Tensor,
    *,
    batch: int = 8,
    progress: Progress = lambda items, label: items,
) -> Evaluation:
    """Compare `program` with `reference` on token rows i64 [count, S]. MoeccError where they can't be compared."""
    pairs = _check(program, reference, rows)
    vocabulary = _width(reference)
    batches = list(
        torch.split(rows, max(1, min(batch, _LOGITS_AT_ONCE // (rows.shape[1] * vocabulary))))
    )
    ours, theirs = (
        _Side(program, [p for p, _ in pairs], batches),
        _Side(reference, [r for _, r in pairs], batches),
    )
    tallies = [_Tally(r.path) for _, r in pairs]
    totals = _Totals()
    for stage in progress(range(reference.layers), "evaluating layers"):
        if stage < reference.layers - 1:
            theirs.advance()
            ours.advance()
        else:
            _last_stage(ours, theirs, batches, totals)
        for (p, r), tally in zip(pairs, tallies, strict=True):
            if r.layer == stage:
                tally.add(ours.pop(p), theirs.pop(r))
    return _evaluation(totals, tallies, program, reference)


def evaluate_models(
    model: str,
    reference: str,
    *,
    text: Path | None = None,
    rows: int = 64,
    length: int = 512,
    batch: int = 8,
    trust_remote_code: bool = False,
    progress: Progress = lambda items, label: items,
    say: Say = print,
) -> Json:
    """What `moecc eval --json` prints of the artifact or checkpoint `model` beside `reference` (folders or hub ids).

    text: a file, by default text that comes with Python; rows x length: tokens of it. MoeccError where they can't be compared.
    """
    folder, original = checkpoint_folder(model), checkpoint_folder(reference)
    tokenizer = tokenizer_of(original, trust_remote_code=trust_remote_code)
    ids = token_rows(tokenizer, text, count=rows, length=length, purpose="evaluation", say=say)
    if _manifest(folder).get("calibration_digest") == rows_digest(ids):
        say(f"note: {model} was calibrated on these very rows; they say little about others")
    programs = [_traced(path, say) for path in (folder, original)]
    if restriction := programs[1].restriction:
        say(f"note: the trace holds for {restriction} only")
    found = evaluate(programs[0], programs[1], ids, batch=batch, progress=progress)
    return {
        "model": model,
        "reference": reference,
        "rows": len(ids),
        "length": ids.shape[1],
        "rows_digest": rows_digest(ids),
        **found.as_dict(),
    }


def _traced(folder: Path, say: Say) -> Program:
    say(f"tracing {folder}")
    program = trace(folder, dtype=torch.float32)
    if program.store is None:
        raise MoeccError(
            f"{folder} has no *.safetensors weights; give a complete checkpoint or artifact"
        )
    program.store.check()
    kept = _manifest(folder).get("experts_kept", {})
    program.kept = {path: tuple(rows) for path, rows in kept.items()}
    return program


def _manifest(folder: Path) -> Json:
    """What moecc.json says, nothing for a checkpoint that moecc did not write."""
    try:
        found = json.loads((folder / "moecc.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def table(found: Json) -> str:
    """What `moecc eval` prints without --json."""
    lines = [
        f"perplexity      {found['perplexity']:.4f}   reference {found['reference_perplexity']:.4f}",
        f"KL              {found['kl']:.5f} nats per token, over {found['tokens']} tokens",
        f"experts chosen  {100 * found['agreement']:.2f} % the same, whole set {100 * found['exact_agreement']:.2f} %",
        f"bits per weight {found['bits_per_weight_experts']:.3f} over routed experts, "
        f"{found['bits_per_weight']:.3f} over everything",
        "",
    ]
    width = max(len(row["path"]) for row in found["per_layer"])
    lines.append(f"{'layer':<{width}}  same experts  whole set  output error")
    for row in found["per_layer"]:
        chosen = f"{100 * row['agreement']:10.2f} %  {100 * row['exact_agreement']:7.2f} %"
        lines.append(f"{row['path']:<{width}}  {chosen}  {row['output_error']:12.5f}")
    return "\n".join(lines)


def _evaluation(
    totals: _Totals, tallies: list[_Tally], program: Program, reference: Program
) -> Evaluation:
    nll, reference_nll, kl = (
        float(x) / totals.tokens for x in (totals.nll, totals.reference_nll, totals.kl)
    )
    for name, value in (("the reference", reference_nll), ("the compiled program", nll)):
        if math.isnan(value):
            raise MoeccError(
                f"{name} computes logits that are not numbers (NaN); its weights or dtype don't hold this model"
            )
    return Evaluation(
        perplexity=_exp(nll), reference_perplexity=_exp(reference_nll), kl=kl,
        agreement=sum(t.same for t in tallies) / sum(t.slots for t in tallies),
        exact_agreement=sum(t.exact for t in tallies) / sum(t.tokens for t in tallies),
        tokens=totals.tokens,
        bits_per_weight_experts=experts_bits(program, reference), bits_per_weight=everything_bits(program, reference),
        per_layer=tuple(t.layer() for t in tallies),
    )  # fmt: skip


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))  # a model that is broken altogether still has a number


# ---------------------------------------------------------------- checks


def _check(program: Program, reference: Program, rows: Tensor) -> list[tuple[MoE, MoE]]:
    """The MoE layers of both in pairs, by path where the paths are the same, else in order."""
    _check_head(reference, "the reference")
    _check_head(program, "the compiled program")
    ours, theirs = program.moe_layers(), reference.moe_layers()
    if len(ours) != len(theirs) or program.layers != reference.layers:
        raise MoeccError(
            f"the compiled program has {len(ours)} MoE layers in {program.layers} stages, the reference {len(theirs)} "
            f"in {reference.layers}; {_OTHER_MODEL}"
        )
    if _width(program) != _width(reference):
        raise MoeccError(
            f"the compiled program has a vocabulary of {_width(program)}, the reference of {_width(reference)}; "
            f"{_OTHER_MODEL}"
        )
    if rows.dim() != 2 or rows.shape[0] < 1 or rows.shape[1] < 2 or rows.dtype != torch.int64:
        raise MoeccError(
            f"token rows must be i64 [1 or more, 2 or more], not {rows.dtype} {list(rows.shape)}"
        )
    for side in (program, reference):
        require_rows(side, rows)
    by_path = {m.path: m for m in ours}
    pairs = (
        [(by_path[r.path], r) for r in theirs]
        if by_path.keys() == {r.path for r in theirs}
        else None
    )
    pairs = pairs or list(zip(ours, theirs, strict=True))
    for p, r in pairs:
        if p.top_k != r.top_k or p.layer != r.layer:
            raise MoeccError(
                f"{r.path}: the reference chooses {r.top_k} experts, the compiled program {p.top_k}; {_OTHER_MODEL}"
            )
        ours_of, theirs_of = (
            side.kept.get(m.path, tuple(range(m.sizes[0])))
            for side, m in ((program, p), (reference, r))
        )
        if not set(ours_of) <= set(theirs_of):
            raise MoeccError(
                f"{r.path}: the reference lacks experts that the compiled program has; {_OTHER_MODEL}"
            )
        if len(ours_of) < len(theirs_of) and not program.kept:
            raise MoeccError(
                f"{r.path}: the reference has {len(theirs_of)} experts, the compiled program {len(ours_of)}, and nothing "
                f"says which; {_OTHER_MODEL}"
            )
    return pairs


def _width(program: Program) -> int:
    return int(output_node(program).meta["val"].shape[-1])


def _check_head(program: Program, what: str) -> None:
    config = text_config(program.config) if program.config is not None else None
    vocabulary, hidden, width = (
        getattr(config, "vocab_size", None),
        getattr(config, "hidden_size", None),
        _width(program),
    )
    if isinstance(vocabulary, int) and (
        width < vocabulary or (width != vocabulary and width == hidden)
    ):
        raise MoeccError(
            f"{what} ends in {width} values per token, not in logits over {vocabulary}; perplexity needs a causal "
            "language model with its head"
        )


# ---------------------------------------------------------------- one program on its way through the layers


class _Side:
    """A program's stream and, of each experts node, the chosen experts and the output of every batch."""

    def __init__(self, program: Program, moes: list[MoE], batches: list[Tensor]):
        self.program, self.stream = program, Stream(program, batches)
        self.wanted = {node.name for m in moes for node in (*_routing(m), m.node)}
        self.seen: dict[tuple[str, int], Tensor] = {}

    def visit(self, node: fx.Node, value: Any, batch: int) -> None:
        if node.name in self.wanted:
            self.seen[node.name, batch] = value

    def advance(self) -> None:
        self.stream.advance(self.visit)

    def pop(self, moe: MoE) -> list[tuple[Tensor, Tensor]]:
        """(chosen experts [T, k], -1 where a slot has no weight; output [T, D]) per batch.

        Experts are numbered as in the source, whatever a pass has taken out of it.
        """
        found = []
        kept = torch.tensor(self.program.kept[moe.path]) if moe.path in self.program.kept else None
        for b in range(len(self.stream.values)):
            index, weight, y = (
                self.seen.pop((node.name, b)) for node in (*_routing(moe), moe.node)
            )
            if kept is not None:
                index = kept[index]
            found.append((torch.where(weight != 0, index, -1), y))
        return found

    @torch.no_grad()
    def logits(self, batch: int, weights: StageWeights) -> Tensor:
        """The last stage for one batch, whose activations are dropped: [B, S, V]."""
        assert self.stream.stage == self.program.layers - 1, "logits come behind the last layer"
        output, nodes = output_node(self.program), stage_nodes(self.program, self.stream.stage)
        values, self.stream.values[batch] = self.stream.values[batch], {}
        for node, value in run_nodes(nodes, values, weights, keep={output.name}):
            self.visit(node, value, batch)
        return cast(Tensor, values[output.name])


def _routing(moe: MoE) -> tuple[fx.Node, fx.Node]:
    """topk_index and the routing weights."""
    return cast(tuple[fx.Node, fx.Node], moe.node.args[1:3])


# ---------------------------------------------------------------- statistics


@dataclass
class _Tally:
    """Sums over the tokens of one MoE layer."""

    path: str
    slots: int = 0
    tokens: int = 0
    same: int = 0
    exact: int = 0
    error: float = 0.0
    norm: float = 0.0

    def add(self, ours: list[tuple[Tensor, Tensor]], theirs: list[tuple[Tensor, Tensor]]) -> None:
        for (index, y), (reference_index, reference_y) in zip(ours, theirs, strict=True):
            same, exact = compare_sets(index, reference_index)
            self.slots, self.tokens = self.slots + index.numel(), self.tokens + len(index)
            self.same, self.exact = self.same + same, self.exact + exact
            self.error += float((y.float() - reference_y.float()).square().sum(dtype=torch.float64))
            self.norm += float(reference_y.float().square().sum(dtype=torch.float64))

    def layer(self) -> LayerAgreement:
        error = self.error / self.norm if self.norm else float(self.error > 0)
        return LayerAgreement(self.path, self.same / self.slots, self.exact / self.tokens, error)


def compare_sets(a: Tensor, b: Tensor) -> tuple[int, int]:
    """For chosen experts a, b i64 [T, k]: how many of a are in b's set too, and how many rows are the same set.

    A slot of -1 chose none, which is the same as none in the other. Sorted and searched, so that the cost is k log k per
    token and not k^2 or E.
    """
    a, b = _sorted(a), _sorted(b)
    at = torch.searchsorted(b, a).clamp(max=b.shape[1] - 1)
    return int((b.gather(1, at) == a).sum()), int((a == b).all(1).sum())


def _sorted(chosen: Tensor) -> Tensor:
    """Rows in order; the nones of a row, first of all, get numbers of their own: -k, -k + 1, ..."""
    chosen, k = chosen.sort(1).values, chosen.shape[1]
    return torch.where(chosen < 0, torch.arange(-k, 0), chosen).contiguous()


@dataclass
class _Totals:
    """Sums over predicted tokens, in nats."""

    tokens: int = 0
    zero: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def __post_init__(self) -> None:
        self.nll, self.reference_nll, self.kl = (
            self.zero.clone(),
            self.zero.clone(),
            self.zero.clone(),
        )

    def add(self, logits: Tensor, reference: Tensor, ids: Tensor) -> None:
        """logits, reference [B, S, V] in any float dtype; ids i64 [B, S]; a row's last token predicts nothing."""
        step = max(1, _PROBABILITIES_AT_ONCE // logits.shape[-1])
        for row, (ours, theirs) in enumerate(zip(logits, reference, strict=True)):
            targets = ids[row, 1:]
            for i in range(0, len(targets), step):
                chunk = slice(i, min(i + step, len(targets)))
                self._add(ours[chunk].float(), theirs[chunk].float(), targets[chunk])
        self.tokens += ids[:, 1:].numel()

    def _add(self, logits: Tensor, reference: Tensor, targets: Tensor) -> None:
        q, p = logits.log_softmax(-1), reference.log_softmax(-1)
        self.nll -= q.gather(1, targets[:, None]).sum(dtype=torch.float64)
        self.reference_nll -= p.gather(1, targets[:, None]).sum(dtype=torch.float64)
        # a masked token (logit -inf in both) has p = 0 and adds nothing; 0 * (inf - inf) would be NaN
        kl = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
        self.kl += kl.sum(dtype=torch.float64)


def _last_stage(ours: _Side, theirs: _Side, batches: list[Tensor], totals: _Totals) -> None:
    weights, reference_weights = StageWeights(ours.program), StageWeights(theirs.program)
    for batch, ids in enumerate(batches):
        totals.add(ours.logits(batch, weights), theirs.logits(batch, reference_weights), ids)
