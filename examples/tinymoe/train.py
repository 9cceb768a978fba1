"""Train a small Mixture-of-Experts language model of any transformers MoE family from text files.

    python examples/tinymoe/train.py --text docs/*.txt --config qwen2_moe --set hidden_size=256 num_hidden_layers=4 \
        num_attention_heads=4 num_key_value_heads=4 num_experts=16 num_experts_per_tok=4 moe_intermediate_size=128 \
        shared_expert_intermediate_size=256 --minutes 30 --upcycle 0.25 -o my-model

  1. A byte-level BPE tokenizer is trained on the text, unless --tokenizer names one. A NUL character separates the
     documents of a file. The documents are shuffled, and the last share of their tokens is held out.
  2. AdamW with warm-up and cosine decay; the clock ends the run. Families with a router loss train with it; those with
     a score correction bias get DeepSeek-V3's update, bias += 0.001 sign(mean load - load) (arXiv 2412.19437, 2.1.2).
  3. While training, an expert takes a fixed number of tokens, so that every product keeps its shape; tokens over that
     are dropped. The saved model knows nothing of it.
  4. --upcycle 0.25: after a quarter of the run all experts restart as one parent plus noise, as in sparse upcycling
     (arXiv 2212.05055), so that they end as relatives.
  5. --start FOLDER: tensors of the same name and shape are taken from that checkpoint (attention, embeddings, norms of the same
     width); experts and routers begin as noise.
  6. The model is saved in bfloat16, loaded again as anyone would, and scored on the held-out text.

Shapes: T tokens, k experts a token, E experts, C tokens an expert takes, D hidden, F intermediate.
"""

import argparse
import json
import math
import random
import shutil
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

END = "<|endoftext|>"


def capacity_forward(experts, x_TD, index_Tk, weight_Tk):
    """The experts' output [T, D]; each takes C = 1.5 T k / E tokens at most (up to a multiple of 64)."""
    (T, k), E = index_Tk.shape, experts.num_experts
    C = math.ceil(1.5 * T * k / E / 64) * 64
    expert, order = index_Tk.reshape(-1).sort(stable=True)
    counts = torch.bincount(expert, minlength=E)
    position = torch.arange(T * k, device=x_TD.device) - (counts.cumsum(0) - counts)[expert]
    kept = position < C
    order, slot = order[kept], (expert * C + position)[kept]
    x_ECD = (
        x_TD.new_zeros(E * C, x_TD.shape[1]).index_copy(0, slot, x_TD[order // k]).view(E, C, -1)
    )
    h_ECF = experts._apply_gate(torch.bmm(x_ECD, experts.gate_up_proj.transpose(1, 2)))
    y = torch.bmm(h_ECF, experts.down_proj.transpose(1, 2)).flatten(0, 1)[slot]
    y = y * weight_Tk.reshape(-1)[order].unsqueeze(-1).to(y.dtype)
    return y.new_zeros(T, y.shape[1]).index_add(0, order // k, y).to(x_TD.dtype)


def fail(message):
    sys.exit(f"error: {message}")


def in_short(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


def train_tokenizer(documents, size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def read_text(options):
    """The tokenizer, and two streams of token ids: for training, and held out."""
    try:
        documents = [
            d for file in options.text for d in file.read_text(encoding="utf-8").split("\0") if d
        ]
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer) if options.tokenizer else None
    except (OSError, ValueError) as error:
        fail(f"can't read the text or the tokenizer: {in_short(error)}")
    random.Random(options.seed).shuffle(documents)
    tokenizer = tokenizer or train_tokenizer(documents, options.vocab_size)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [
        i
        for d in documents
        for i in tokenizer(d, add_special_tokens=False, verbose=False)["input_ids"] + end
    ]
    stream, split = torch.tensor(ids), int(len(ids) * (1 - options.held_out))
    if min(split, len(ids) - split) <= options.length:
        fail(
            f"too little text: {len(ids)} tokens, {options.held_out:.0%} of them held out, for rows of {options.length}"
        )
    return tokenizer, stream[:split], stream[split:]


def make_config(source, settings, tokenizer):
    """The transformers config of a .json file or a model type, with the KEY=VALUE settings on top."""
    values = (
        json.loads(Path(source).read_text()) if source.endswith(".json") else {"model_type": source}
    )
    if (kind := values.pop("model_type")) not in CONFIG_MAPPING:
        raise ValueError("transformers has no such model type")
    known = AutoConfig.for_model(kind)
    for key, _, value in (setting.partition("=") for setting in settings):
        if not hasattr(known, key):
            raise ValueError(f"{kind} has no setting {key!r}")
        try:
            values[key] = json.loads(value)
        except json.JSONDecodeError:
            values[key] = value  # a string
    end = tokenizer.eos_token_id
    values |= {
        "vocab_size": len(tokenizer),
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": None,
    }
    config = AutoConfig.for_model(kind, **values)
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = True  # makes the router's own loss a part of the loss
    return config


def make_model(config, device):
    """The model with random weights, and its routed-experts modules."""
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > 2e9:
        raise ValueError(
            f"{size / 1e9:.1f} billion parameters are too many for this script; --set smaller sizes"
        )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
    layers = [
        m for n, m in model.named_modules() if n.endswith(".experts") and hasattr(m, "down_proj")
    ]
    if not layers:
        raise ValueError("with these settings there are no routed experts")
    unusual = ("is_transposed", "has_bias", "has_post_expert_norm")
    if all(
        m.has_gate and m.is_concatenated and not any(getattr(m, u, False) for u in unusual)
        for m in layers
    ):
        ALL_EXPERTS_FUNCTIONS["capacity"] = capacity_forward
        model.set_experts_implementation("capacity")
    return model, layers


@torch.no_grad()
def start_from(folder, model):
    """Copy what has the same name and shape outside the MoE blocks; how many tensors that were."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    same = {
        n: t
        for n, t in model.state_dict().items()
        if n in theirs and theirs[n].shape == t.shape and ".mlp." not in n
    }
    for name, tensor in same.items():
        tensor.copy_(theirs[name])
    return len(same)


def watch_loads(model, layers):
    """Routed tokens of each expert in the latest step [E], by layer; keeps the score correction biases up to date."""
    loads = [torch.ones(1)] * len(layers)
    blocks = [block for block in model.modules() if getattr(block, "experts", None) in layers]
    for number, block in enumerate(blocks):
        tensors = [*block.named_buffers(), *block.named_parameters()]
        bias = next((t for n, t in tensors if n.endswith("e_score_correction_bias")), None)

        def count(module, inputs, number=number, bias=bias):
            loads[number] = load = torch.bincount(
                inputs[1].reshape(-1), minlength=module.num_experts
            ).float()
            if bias is not None:
                bias.data += 0.001 * (load.mean() - load).sign()

        block.experts.register_forward_pre_hook(count)
    return loads


@torch.no_grad()
def upcycle(layers, optimizer):
    """Restart every expert as the first one plus noise of a quarter of the weights' standard deviation."""
    for weight in (p for experts in layers for p in experts.parameters() if p.ndim == 3):
        weight.copy_(weight[:1] + torch.randn_like(weight) * weight.std() * 0.25)
        optimizer.state[weight]["exp_avg"].zero_()


def rows(stream, options, generator):
    starts = torch.randint(
        0, len(stream) - options.length, (options.batch,), generator=generator
    ).tolist()
    return torch.stack([stream[s : s + options.length] for s in starts]).to(options.device)


def train(model, layers, stream, options):
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [[p for p in weights if p.ndim >= 2], [p for p in weights if p.ndim < 2]]
    groups = [
        {"params": g, "weight_decay": decay} for g, decay in zip(groups, (0.1, 0.0), strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    loads, generator = watch_loads(model, layers), torch.Generator().manual_seed(options.seed)
    start = shown = time.monotonic()
    step, done, restart = 0, 0.0, options.upcycle or math.inf
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = (
                options.lr
                * min(1, (step + 1) / 100)
                * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
            )
        batch = rows(stream, options, generator)
        with torch.autocast(torch.device(options.device).type, dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, now = step + 1, time.monotonic()
        done = (now - start) / (60 * options.minutes)
        if done >= restart:
            upcycle(layers, optimizer)
            restart = math.inf
            print(f"step {step}: all experts restart from one parent", flush=True)
        if step % 25 == 0:
            if not math.isfinite(loss.item()):
                fail(f"the loss is {loss.item()} after {step} steps; try a smaller --lr")
            busiest = max((load.max() / load.mean()).item() for load in loads)
            speed, shown = 25 * batch.numel() / (now - shown), now
            print(
                f"step {step}: loss {loss.item():.3f}, busiest expert {busiest:.2f} times the mean, ",
                end="",
            )
            print(
                f"{speed:.0f} tokens/s, {(now - start) / 60:.1f} of {options.minutes:g} minutes",
                flush=True,
            )
    return step


@torch.no_grad()
def held_out_loss(folder, stream, options):
    model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(options.device).eval()
    )
    model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(0)
    batches = [rows(stream, options, generator) for _ in range(8)]
    return sum(model(input_ids=b, labels=b).loss.item() for b in batches) / len(batches)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", nargs="+", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--config", required=True, help="a config.json, or a model type such as qwen2_moe"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        action="extend",
        metavar="KEY=VALUE",
        help="VALUE is JSON or a string",
    )
    parser.add_argument("--tokenizer", help="folder of a tokenizer to use instead of training one")
    parser.add_argument(
        "--vocab-size", type=int, default=4096, help="of the tokenizer that is trained"
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument(
        "--start", metavar="FOLDER", help="checkpoint to take attention, embeddings and norms from"
    )
    parser.add_argument(
        "--upcycle",
        type=float,
        metavar="SHARE",
        help="restart all experts at this share of the run",
    )
    parser.add_argument("--batch", type=int, default=16, help="rows a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--held-out", type=float, default=0.02, metavar="SHARE")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to make")
    return parser.parse_args()


def main():
    options = arguments()
    torch.manual_seed(options.seed)
    if options.out.exists():
        fail(f"{options.out} is there already")
    tokenizer, stream, held_out = read_text(options)
    try:
        config = make_config(options.config, options.set, tokenizer)
        model, layers = make_model(config, options.device)
    except Exception as error:  # each family checks its settings in its own way
        fail(f"{options.config}: {in_short(error)}")
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{config.model_type}: {size:.1f} million parameters, {len(stream)} tokens", flush=True)
    if options.start:
        print(f"{start_from(options.start, model)} tensors are {options.start}'s", flush=True)
    steps = train(model, layers, stream, options)
    if hasattr(config, "output_router_logits"):
        model.config.output_router_logits = (
            False  # a saved model answers with the language loss alone
        )
    partial = options.out.with_name(options.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    loss = held_out_loss(partial, held_out, options)
    partial.rename(options.out)
    print(
        f"{options.out}: {steps} steps, held-out loss {loss:.3f}, perplexity {math.exp(loss):.2f}"
    )


if __name__ == "__main__":
    main()
