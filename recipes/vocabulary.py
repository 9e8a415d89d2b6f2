"""New tokens for the embedded model: how their numbers start, over a factored and a dense table.

The model was trained on Python's standard library. Here it reads the source of torch with 256
tokens that it never had, the words that its own tokens split most wastefully. Its table, which is
the output head too, is factored; then nothing is trained but the numbers of the new tokens:
coordinates over the old basis (UNKs Everywhere, arXiv 2012.15562), or rows of the dense table. They
start from the mean of all tokens, at random, from the tokens that a word was split into, or from
the ten nearest tokens by word vectors (OFA, arXiv 2311.08849), which are made here of the words'
neighbours in the text (positive pointwise mutual information and an SVD).

    python recipes/vocabulary.py                          # less than five minutes of two cores
    python recipes/vocabulary.py --ratio 0.5 --seeds 3

Losses are of held-out files, in nats per byte, since tokens of different vocabularies differ in
length. OFA's abstract claims that its start accelerates the convergence of continued pretraining,
whose new embeddings usually start at random, and that factored tables, with far fewer parameters,
are competitive or better. Theirs are encoders for hundreds of languages, with all weights trained.
"""

from __future__ import annotations

import argparse
import copy
import re
import time
from collections import Counter
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

import lowrank
from lowrank.demo import tiny_lm

STARTS = ("mean", "random", "subwords", "neighbours")
PIECE = 512  # characters of the held-out text that are read at once


def texts(most: int) -> tuple[list[str], str]:
    """Sources of torch to train on, and one text of other ones."""
    root = Path(torch.__file__).parent
    every = [p for part in ("nn", "optim", "distributions") for p in (root / part).rglob("*.py")]
    read = [path.read_text(encoding="utf-8") for path in sorted(every)]
    read = [text for text in read if 2000 < len(text) < 60_000][:most]
    held = "\n".join(read[::8])
    return [text for place, text in enumerate(read) if place % 8], held


def wasteful(tokenizer: Any, train: list[str], count: int) -> list[str]:
    """The words that cost most tokens more than one, with the space before them."""
    seen = Counter(word for text in train for word in re.findall(r" ?[A-Za-z]{3,}", text))
    cost = {word: len(tokenizer.tokenize(word)) for word in seen}
    ranked = sorted(seen, key=lambda word: (-(cost[word] - 1) * seen[word], word))
    return [word for word in ranked if cost[word] > 1][:count]


def neighbours(tokenizer: Any, train: list[str], new: list[str]) -> dict[str, dict[str, float]]:
    """Cosines of each new token to old ones: an old one's vector is the mean of those of the words
    that it is a part of."""
    lines = [re.findall(r"\w+", text.lower()) for text in train]
    common = [word for word, _ in Counter(w for line in lines for w in line).most_common(3000)]
    place = {word: i for i, word in enumerate(common)}
    counts = torch.zeros(len(common), len(common))
    for line in lines:
        ids = torch.tensor([place[word] for word in line if word in place])
        for apart in range(1, 5):
            pair = ids[:-apart] * len(common) + ids[apart:]
            counts += torch.bincount(pair, minlength=len(common) ** 2).view_as(counts)
    counts += counts.T.clone()
    share = counts.sum(0) / counts.sum()
    shifted = (counts / counts.sum() / (share[:, None] * share)).log().clamp(min=0).nan_to_num()
    left, scale, _ = torch.svd_lowrank(shifted, q=64, niter=4)
    vectors = left * scale.sqrt()
    parts: dict[str, list[Tensor]] = {}
    for word in common:
        for piece in {*tokenizer.tokenize(word), *tokenizer.tokenize(f" {word}")}:
            parts.setdefault(piece, []).append(vectors[place[word]])
    old = [*parts]
    table = normalize(torch.stack([torch.stack(parts[piece]).mean(0) for piece in old]), dim=1)
    known = [word for word in new if word.strip().lower() in place]
    near = {word: table @ normalize(vectors[place[word.strip().lower()]], dim=0) for word in known}
    return {word: dict(zip(old, cosine.tolist(), strict=True)) for word, cosine in near.items()}


@torch.no_grad()
def nats_per_byte(model: Any, tokenizer: Any, text: str) -> float:
    """Every piece of the text follows the token that ends documents."""
    end, total = tokenizer.eos_token_id, 0.0
    pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    rows = [torch.tensor([end, *tokenizer(piece)["input_ids"]]) for piece in pieces]
    for start in range(0, len(rows), 16):
        batch = nn.utils.rnn.pad_sequence(rows[start : start + 16], True, -100)
        logits = model(input_ids=batch[:, :-1].clamp(min=end)).logits
        total += float(cross_entropy(logits.mT, batch[:, 1:], reduction="sum"))
    return total / len(text.encode())


def train(model: Any, ids: list[int], stream: Tensor, rate: float, options: Any, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with lowrank.only_tokens(model, ids) as groups:
        optimizer = torch.optim.AdamW(groups, lr=rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rate, total_steps=options.steps, pct_start=0.1, cycle_momentum=False
        )
        for _ in range(options.steps):
            starts = torch.randint(len(stream) - options.length, (options.batch,), generator=draw)
            rows = torch.stack([stream[s : s + options.length + 1] for s in starts])
            logits = model(input_ids=rows[:, :-1]).logits
            optimizer.zero_grad()
            cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
            optimizer.step()
            schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=256, help="new tokens")
    parser.add_argument("--ratio", type=float, default=0.8, help="of the table's numbers, kept")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.03])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--files", type=int, default=120)
    parser.add_argument("--held", type=int, default=20_000, help="characters held out")
    parser.add_argument("--starts", nargs="+", default=STARTS, choices=STARTS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    begun, tiny = time.perf_counter(), tiny_lm()
    sources, held = texts(options.files)
    held = held[: options.held]
    new = wasteful(tiny.tokenizer, sources, options.tokens)
    small, _ = lowrank.compress(
        tiny.model, options.ratio, target_modules=["embed_tokens"], data=tiny.calibration,
        tokenizer=tiny.tokenizer, copy=True, progress=False,
    )  # fmt: skip
    cosines = neighbours(tiny.tokenizer, sources, new)
    longer = copy.deepcopy(tiny.tokenizer)
    longer.add_tokens(new)
    counts = [len(which(held, verbose=False)["input_ids"]) for which in (tiny.tokenizer, longer)]
    print(f"{len(new)} new tokens, such as{', '.join(new[:8])}; {len(cosines)} have word vectors")
    print(
        f"held out {len(held.encode()):,} bytes: {counts[0]:,} old tokens, {counts[1]:,} with new"
    )
    ids = [longer(text, verbose=False)["input_ids"] for text in sources]
    stream = torch.tensor([token for text in ids for token in text])
    heads = "".join(f"{head:>9}" for head in ("numbers", "rate", "before", "after"))
    print(f"\n{'table':12}{'start':12}{heads}  of each seed")
    for name, model in (("factored", small), ("dense", tiny.model)):
        old = nats_per_byte(model, tiny.tokenizer, held)
        print(f"{name:12}{'old tokens':12}{0:9}{'':9}{old:9.4f}", flush=True)
        for start in options.starts:
            similar = cosines if start == "neighbours" else start
            found: dict[float, list[float]] = {}
            first: list[float] = []
            for rate in options.rates:
                for seed in range(options.seeds):
                    longer, work = copy.deepcopy(tiny.tokenizer), copy.deepcopy(model)
                    done = lowrank.extend_vocabulary(work, longer, new, similar=similar, seed=seed)
                    if len(first) < options.seeds:
                        first.append(nats_per_byte(work, longer, held))
                    train(work, done.ids, stream, rate, options, seed)
                    found.setdefault(rate, []).append(nats_per_byte(work, longer, held))
            best = min(found, key=lambda rate: mean(found[rate]))
            each = " ".join(f"{loss:.4f}" for loss in found[best])
            print(
                f"{name:12}{start:12}{done.numbers:9,}{best:9g}{mean(first):9.4f}"
                f"{mean(found[best]):9.4f}  {each}",
                flush=True,
            )
    print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
