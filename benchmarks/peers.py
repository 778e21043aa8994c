"""What do the PyTorch packages of FLORA and GaLore take at the same shape?

    pip install torch accelerate transformers bitsandbytes flora-opt==0.0.3 galore-torch==1.0
    python benchmarks/peers.py --model gpt2

The GPT-2 of the other benchmarks in PyTorch, layers checkpointed, logits in chunks, TF32 products
as in JAX; Adafactor everywhere, and nothing patched:

    none       transformers' Adafactor after every micro-batch
    full       the same after summing gradients at full size, in `.grad`
    flora-opt  `FloraAccelerator` and `Flora`: it compresses the embedding too, and cannot be told
               not to, and updates each weight within the backward pass
    galore     `GaLoreAdafactor`, no accumulation; its first step, with an SVD per matrix, is apart

The peak is that of PyTorch's allocator, from the second update on.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any, Literal

from florax_benchmarks import models, results, tables, workload

PEERS = ("none", "full", "flora-opt", "galore")


@dataclasses.dataclass(frozen=True)
class Settings(workload.Workload):
    methods: tuple[Literal[PEERS], ...] = PEERS  # to compare
    rounds: int = 3  # timed updates of each method, after one that is not

    def __post_init__(self):
        super().__post_init__()
        if self.shape.family != "gpt2":
            raise ValueError(f"model must be a GPT-2, got {self.model}")


def make_model(shape: models.Shape) -> Any:
    import torch
    from torch import nn
    from torch.nn import functional
    from torch.utils.checkpoint import checkpoint

    def linear(inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width = shape.width
            self.attention_norm, self.feed_forward_norm = nn.RMSNorm(width), nn.RMSNorm(width)
            self.query, self.key, self.value, self.out = (linear(width, width) for _ in range(4))
            self.up = linear(width, shape.feed_forward)
            self.down = linear(shape.feed_forward, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            def heads(x: torch.Tensor) -> torch.Tensor:
                return x.unflatten(-1, (shape.heads, shape.head_size)).transpose(1, 2)

            y = self.attention_norm(x)
            q, k, v = heads(self.query(y)), heads(self.key(y)), heads(self.value(y))
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).flatten(2))
            return x + self.down(functional.gelu(self.up(self.feed_forward_norm(x))))

    class GPT2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(shape.vocabulary, shape.width)
            self.blocks = nn.ModuleList(Block() for _ in range(shape.layers))
            self.norm = nn.RMSNorm(shape.width)
            for p in self.parameters():
                if p.ndim == 2:
                    nn.init.normal_(p, std=0.02)

        def chunk_loss(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            logits = (x @ self.embed.weight.T).float()
            return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x, labels = self.embed(tokens[:, :-1]), tokens[:, 1:]
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            chunks = zip(
                self.norm(x).split(models.CHUNK, 1), labels.split(models.CHUNK, 1), strict=True
            )
            losses = [checkpoint(self.chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]
            return torch.stack(losses).sum() / labels.numel()

    return GPT2()


def make_update(name: str, s: Settings, model: Any) -> tuple[Callable[[Any], Any], int]:
    """A function that trains on one micro-batch, and its calls for an update."""
    if name == "flora-opt":
        from flora_opt import Flora, FloraAccelerator

        accelerator = FloraAccelerator(s.rank, gradient_accumulation_steps=s.accumulate)
        model, optimizer = accelerator.prepare(model, Flora(model.parameters(), lr=1e-4))

        def micro_step(tokens: Any) -> Any:
            with accelerator.accumulate(model):
                loss = model(tokens)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            return loss

        return micro_step, s.accumulate

    settings = {"lr": 1e-4, "relative_step": False}
    if name == "galore":
        from galore_torch import GaLoreAdafactor

        matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if not any(p is m for m in matrices)]
        galore = {"rank": s.rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
        groups = [{"params": others}, {"params": matrices, **galore}]
        optimizer, calls = GaLoreAdafactor(groups, **settings), 1
    else:
        from transformers import Adafactor

        optimizer = Adafactor(model.parameters(), **settings)
        calls = s.accumulate if name == "full" else 1
    count = 0

    def micro_step(tokens: Any) -> Any:
        nonlocal count
        loss = model(tokens)
        (loss / calls).backward()
        count += 1
        if count % calls == 0:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    return micro_step, calls


def measure(s: Settings, name: str, known: str | None) -> dict[str, Any] | None:
    import torch

    packages = {"flora-opt": ["flora-opt"], "galore": ["galore-torch"]}.get(name, ["transformers"])
    program = " ".join(f"{x} {metadata.version(x)}" for x in ["torch", *packages])
    if program == known:
        return None
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    shape = models.SHAPES[s.model]
    with torch.device(device):
        model = make_model(shape).to(getattr(torch, s.dtype))
        tokens = torch.randint(shape.vocabulary, (s.batch, s.length + 1))
    micro_step, calls = make_update(name, s, model)

    def update() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            loss = micro_step(tokens)
        loss.item()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = update()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = [update() for _ in range(s.rounds)]
    parameters = {p.data_ptr(): p.nbytes for p in model.parameters()}
    return {
        "program": program,
        "params_bytes": sum(parameters.values()),
        "device_peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "micro_step_ms": round(statistics.median(seconds) / calls * 1e3, 2),
        "first_update_seconds": round(first, 2),
    }


def main(s: Settings) -> None:
    print(f"{s.title}\n{tables.peers(workload.measure_each(s, 'peers', measure))}")


if __name__ == "__main__":
    main(results.settings(Settings, __doc__))
