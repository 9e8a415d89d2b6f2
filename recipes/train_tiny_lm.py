"""Train the small Llama that ships with the package: hard to compress, made by anyone.

The text is the source of Python's own standard library (PSF licence). Matrices are trained with
Muon (Jordan et al. 2024), whose updates have full rank, without weight decay and for at least
60 tokens per parameter; a model trained briefly with AdamW and weight decay is nearly low-rank
already and shows nothing. The run ends with the check that accepts the model: plain SVD at
keep 0.8 must cost a mean KL of at least 0.5 nats per token on held-out text.

    python recipes/train_tiny_lm.py --out tiny-lm            # about an hour of two cores
    python recipes/train_tiny_lm.py --out tiny-lm --check    # only the check, on a finished model

With `--experts 8` a small mixture instead, two experts a token, for benchmarks/experts.py; ten
minutes with `--tokens-per-parameter 2`. Muon takes matrices, so each expert is trained as a layer.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)  # fmt: skip

from lowrank.walk.parts import separate_parts

END = "<|endoftext|>"
VOCABULARY, CONTEXT, BATCH = 1024, 256, 32
BALANCE = 0.02  # of the loss that keeps a mixture's experts in use (Switch, arXiv 2101.03961)
# Modules nobody trained on: the first list measures, the second one calibrates.
HELD_OUT = [
    "ast.py", "bisect.py", "calendar.py", "fractions.py", "graphlib.py", "heapq.py", "queue.py",
    "shlex.py", "textwrap.py",
]  # fmt: skip
CALIBRATION = [
    "csv.py", "dis.py", "fnmatch.py", "gzip.py", "plistlib.py", "sched.py", "statistics.py",
    "string.py", "tokenize.py",
]  # fmt: skip
# Tables, generated text and test data: no code to learn from.
LEFT_OUT = ("test", "tests", "idlelib", "encodings", "site-packages", "pydoc_data", "_bundled")


def sources() -> tuple[list[str], str, str]:
    """Training documents, the held-out text, and the calibration text."""
    root = Path(sysconfig.get_path("stdlib"))
    train, aside = [], {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if any(part in LEFT_OUT for part in name.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if str(name) in HELD_OUT + CALIBRATION:
            aside[str(name)] = text
        elif len(text) > 200:
            train.append(text)
    held_out = "\n".join(aside[name] for name in HELD_OUT)
    calibration = "\n".join(aside[name] for name in CALIBRATION)
    return train, held_out, calibration


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text has an encoding, nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END
    )


def new_model(end: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return LlamaForCausalLM(config)


def new_mixture(end: int, experts: int) -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=experts,
        num_experts_per_tok=2,
        output_router_logits=True,
        max_position_embeddings=2 * CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return MixtralForCausalLM(config)


def rate(step: int, steps: int) -> float:
    """Short warm-up, constant, then a linear fall over the last 40 %."""
    return min(1.0, (step + 1) / 50, max(0.0, (steps - step) / (0.4 * steps)))


def fit(model: PreTrainedModel, stream: torch.Tensor, steps: int, seed: int) -> float:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: rate(s, steps)) for o in optimizers]
    generator = torch.Generator().manual_seed(seed)
    mean, started = math.nan, time.time()
    model.train()
    for step in range(steps):
        starts = torch.randint(len(stream) - CONTEXT - 1, (BATCH,), generator=generator)
        rows = torch.stack([stream[s : s + CONTEXT + 1] for s in starts]).long()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(input_ids=rows[:, :-1])
        loss = cross_entropy(output.logits.float().flatten(0, 1), rows[:, 1:].flatten())
        balance = getattr(output, "aux_loss", None)  # of a mixture, so that all experts are used
        if balance is not None:
            loss = loss + BALANCE * balance
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        mean = loss.item() if step == 0 else 0.98 * mean + 0.02 * loss.item()
        if step % 100 == 0 or step == steps - 1:
            tokens_s = (step + 1) * BATCH * CONTEXT / (time.time() - started)
            print(f"step {step:5d}/{steps}  loss {mean:.4f}  {tokens_s:,.0f} tokens/s", flush=True)
    model.eval()
    return mean


def check(folder: Path, least: float = 0.5) -> None:
    """KL of plain SVD at keep 0.8, 0.6 and 0.4 on the held-out text, and the dense perplexity."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import lowrank
    from lowrank.demo import TinyLM, held_out_rows, judge

    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = (folder / "heldout.txt").read_text(encoding="utf-8")
    rows = held_out_rows(TinyLM(dense, AutoTokenizer.from_pretrained(folder), text, ""))
    keeps = (0.8, 0.6, 0.4)
    small = [lowrank.compress(dense, k, data=None, copy=True, progress=False)[0] for k in keeps]
    (perplexity, _), *found = judge([dense, *small], rows)
    print(f"dense perplexity {perplexity:.2f}")
    for keep, (_, away) in zip(keeps, found, strict=True):
        print(f"plain SVD at keep {keep}: KL {away:.3f}")
    if found[0][1] < least:
        raise SystemExit(f"not accepted: plain SVD at 0.8 costs {found[0][1]:.3f} < {least}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens-per-parameter", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--experts", type=int, default=0)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.check:
        check(arguments.out, 0.3 if arguments.experts else 0.5)
        return
    torch.manual_seed(arguments.seed)
    train, held_out, calibration = sources()
    tokenizer = train_tokenizer(train)
    stream = torch.tensor(
        [t for text in train for t in [0, *tokenizer(text).input_ids]], dtype=torch.int16
    )
    end = tokenizer.eos_token_id
    model = new_mixture(end, arguments.experts) if arguments.experts else new_model(end)
    parameters = model.num_parameters()
    steps = math.ceil(arguments.tokens_per_parameter * parameters / (BATCH * CONTEXT))
    print(f"{parameters:,} parameters, {len(stream):,} tokens of text, {steps:,} steps", flush=True)
    with separate_parts(model):
        loss = fit(model, stream, steps, arguments.seed)
    model.config.output_router_logits = False  # for training only
    folder = arguments.out
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "heldout.txt").write_text(held_out, encoding="utf-8")
    (folder / "calibration.txt").write_text(calibration, encoding="utf-8")
    made = {
        "parameters": parameters,
        "tokens_seen": steps * BATCH * CONTEXT,
        "tokens_of_text": len(stream),
        "final_train_loss": round(loss, 4),
        "seed": arguments.seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "held_out": HELD_OUT,
        "calibration": CALIBRATION,
    }
    (folder / "training.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(made, indent=2))


if __name__ == "__main__":
    sys.exit(main())
