"""Train a small Mixture-of-Experts language model of any transformers MoE family from text files.

    python examples/tinymoe/train.py --text docs/*.txt --config qwen2_moe --minutes 30 \
        --set hidden_size=256 num_hidden_layers=4 num_attention_heads=4 num_key_value_heads=4 \
              num_experts=16 num_experts_per_tok=4 moe_intermediate_size=128 \
              shared_expert_intermediate_size=256 --upcycle 0.25 -o my-model

  1. Train a byte-level BPE tokenizer on the text, unless --tokenizer names one. A NUL character
     separates the documents of a file. Shuffle the documents and hold out the last share of tokens.
  2. Train with AdamW, warm-up and cosine decay until the clock ends the run. Families with a router
     loss use it. A score correction bias gets DeepSeek-V3's update,
     bias += 0.001 sign(mean load - load) (arXiv 2412.19437, 2.1.2).
  3. While training, each expert takes a fixed number of tokens, so that every product keeps its
     shape; further tokens are dropped. The saved model has no such limit.
  4. --upcycle 0.25: after a quarter of the run, all experts restart as one parent plus noise, as in
     sparse upcycling (arXiv 2212.05055), so that they end as relatives.
  5. --start FOLDER: take tensors of the same name and shape from that checkpoint (attention,
     embeddings, norms of the same width). Experts and routers begin as noise.
  6. Save the model in bfloat16, load it again as any user would, score it on the held-out text.

Shapes: T tokens, k experts a token, E experts, C capacity (tokens an expert takes), D hidden,
F intermediate.
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
    """Return the experts' output [T, D].

    Each expert takes at most C = 1.5 T k / E tokens, rounded up to a multiple of 64.
    """
    (T, k), E = index_Tk.shape, experts.num_experts
    C = math.ceil(1.5 * T * k / E / 64) * 64
    expert, order = index_Tk.reshape(-1).sort(stable=True)
    counts = torch.bincount(expert, minlength=E)
    # sorted by expert, so a token's place among its expert's tokens is its distance from the first
    position = torch.arange(T * k, device=x_TD.device) - (counts.cumsum(0) - counts)[expert]
    kept = position < C
    order, slot = order[kept], (expert * C + position)[kept]
    x_ECD = x_TD.new_zeros(E * C, x_TD.shape[1]).index_copy(0, slot, x_TD[order // k])
    x_ECD = x_ECD.view(E, C, -1)
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
    """Return the tokenizer and two streams of token ids: for training, and held out."""
    try:
        texts = [file.read_text(encoding="utf-8") for file in options.text]
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer) if options.tokenizer else None
    except (OSError, ValueError) as error:
        fail(f"can't read the text or the tokenizer: {in_short(error)}")
    documents = [document for text in texts for document in text.split("\0") if document]
    random.Random(options.seed).shuffle(documents)
    tokenizer = tokenizer or train_tokenizer(documents, options.vocab_size)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = []
    for document in documents:
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] + end
    stream, split = torch.tensor(ids), int(len(ids) * (1 - options.held_out))
    if min(split, len(ids) - split) <= options.length:
        held = f"{options.held_out:.0%} of them held out"
        fail(f"too little text: {len(ids)} tokens, {held}, for rows of {options.length}")
    return tokenizer, stream[:split], stream[split:]


def make_config(source, settings, tokenizer):
    """Return the transformers config of a .json file or a model type, with KEY=VALUE settings.

    Raise ValueError for a model type or a setting that transformers does not have.
    """
    values = {"model_type": source}
    if source.endswith(".json"):
        values = json.loads(Path(source).read_text())
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
    values |= {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": end}
    values["pad_token_id"] = None
    config = AutoConfig.for_model(kind, **values)
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = True  # adds the router's own loss to the model's
    return config


def make_model(config, device):
    """Return the model with random weights and its modules of routed experts.

    Raise ValueError if it is too large or has no routed experts.
    """
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > 2e9:
        billions = f"{size / 1e9:.1f} billion parameters"
        raise ValueError(f"{billions} are too many for this script; --set smaller sizes")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
    modules = [m for name, m in model.named_modules() if name.endswith(".experts")]
    layers = [m for m in modules if hasattr(m, "down_proj")]
    if not layers:
        raise ValueError("with these settings there are no routed experts")
    unusual = ("is_transposed", "has_bias", "has_post_expert_norm")

    def usual(m):
        return m.has_gate and m.is_concatenated and not any(getattr(m, u, False) for u in unusual)

    if all(usual(m) for m in layers):
        ALL_EXPERTS_FUNCTIONS["capacity"] = capacity_forward
        model.set_experts_implementation("capacity")
    return model, layers


@torch.no_grad()
def start_from(folder, model):
    """Copy tensors of the same name and shape outside the MoE blocks; return their number."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    copied = 0
    for name, tensor in model.state_dict().items():
        if name in theirs and theirs[name].shape == tensor.shape and ".mlp." not in name:
            tensor.copy_(theirs[name])
            copied += 1
    return copied


def watch_loads(model, layers):
    """Return each layer's routed tokens by expert [E] in the latest step, updated by hooks.

    The hooks also update the score correction biases.
    """
    loads = [torch.ones(1)] * len(layers)
    blocks = [block for block in model.modules() if getattr(block, "experts", None) in layers]
    for number, block in enumerate(blocks):
        tensors = [*block.named_buffers(), *block.named_parameters()]
        bias = next((t for n, t in tensors if n.endswith("e_score_correction_bias")), None)

        def count(module, inputs, number=number, bias=bias):
            chosen = inputs[1].reshape(-1)
            loads[number] = load = torch.bincount(chosen, minlength=module.num_experts).float()
            if bias is not None:
                bias.data += 0.001 * (load.mean() - load).sign()

        block.experts.register_forward_pre_hook(count)
    return loads


@torch.no_grad()
def upcycle(layers, optimizer):
    """Restart every expert as the first one plus noise.

    The noise has a quarter of the weights' standard deviation.
    """
    for weight in (p for experts in layers for p in experts.parameters() if p.ndim == 3):
        weight.copy_(weight[:1] + torch.randn_like(weight) * weight.std() * 0.25)
        optimizer.state[weight]["exp_avg"].zero_()


def rows(stream, options, generator):
    """Draw a batch of token rows."""
    last = len(stream) - options.length
    starts = torch.randint(0, last, (options.batch,), generator=generator).tolist()
    return torch.stack([stream[s : s + options.length] for s in starts]).to(options.device)


def make_optimizer(weights):
    """Return AdamW with weight decay on matrices alone."""
    matrices, vectors = [p for p in weights if p.ndim >= 2], [p for p in weights if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def learning_rate(peak, step, done):
    """Return the rate at a step and a share of the run: 100 steps of warm-up, cosine to 2 %."""
    return peak * min(1, (step + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))


def train(model, layers, stream, options):
    """Train until the clock ends the run; return the number of steps."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(weights)
    loads, generator = watch_loads(model, layers), torch.Generator().manual_seed(options.seed)
    start = shown = time.monotonic()
    step, done, restart = 0, 0.0, options.upcycle or math.inf
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options.lr, step, done)
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
            told = f"loss {loss.item():.3f}, busiest expert {busiest:.2f} times the mean"
            clock = f"{(now - start) / 60:.1f} of {options.minutes:g} minutes"
            print(f"step {step}: {told}, {speed:.0f} tokens/s, {clock}", flush=True)
    return step


@torch.no_grad()
def held_out_loss(folder, stream, options):
    """Return the saved model's loss on rows of the held-out text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = model.to(options.device).eval()
    model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(0)
    batches = [rows(stream, options, generator) for _ in range(8)]
    return sum(model(input_ids=b, labels=b).loss.item() for b in batches) / len(batches)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--text", nargs="+", type=Path, required=True, metavar="FILE")
    add("--config", required=True, help="a config.json, or a model type such as qwen2_moe")
    settings = dict(nargs="+", default=[], action="extend", metavar="KEY=VALUE")
    add("--set", **settings, help="VALUE is JSON or a string")
    add("--tokenizer", help="folder of a tokenizer to use instead of training one")
    add("--vocab-size", type=int, default=4096, help="of the tokenizer that is trained")
    add("--minutes", type=float, default=30)
    start = "checkpoint to take attention, embeddings and norms from"
    add("--start", metavar="FOLDER", help=start)
    upcycle = "restart all experts at this share of the run"
    add("--upcycle", type=float, metavar="SHARE", help=upcycle)
    add("--batch", type=int, default=16, help="rows a step")
    add("--length", type=int, default=256, help="tokens a row")
    add("--lr", type=float, default=2e-3)
    add("--held-out", type=float, default=0.02, metavar="SHARE")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--seed", type=int, default=0)
    add("-o", "--out", type=Path, required=True, help="folder to make")
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
        # a saved model answers with the language loss alone
        model.config.output_router_logits = False
    partial = options.out.with_name(options.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    loss = held_out_loss(partial, held_out, options)
    partial.rename(options.out)
    score = f"held-out loss {loss:.3f}, perplexity {math.exp(loss):.2f}"
    print(f"{options.out}: {steps} steps, {score}")


if __name__ == "__main__":
    main()
