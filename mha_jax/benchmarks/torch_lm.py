"""The language model of mha_jax.models in PyTorch: the same products, norms and parameters, and PyTorch's attention.

PyTorch is no requirement of this package; only the benchmark reads this file, where PyTorch is installed.
"""

from collections.abc import Callable

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

from mha_jax.specs import HeadShape, ModelSpec, RunSpec


class Block(nn.Module):
    """Pre-norm attention and feed-forward, without dropout; as many key/value heads as heads."""

    def __init__(self, model: ModelSpec, heads: HeadShape):
        super().__init__()
        H, K, V, D = heads.num_heads, heads.qk_dim, heads.v_dim, model.d_model
        self.num_heads = H
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(D, eps=1e-6), nn.LayerNorm(D, eps=1e-6)
        self.query, self.key = nn.Linear(D, H * K, bias=False), nn.Linear(D, H * K, bias=False)
        self.value, self.out = nn.Linear(D, H * V, bias=False), nn.Linear(H * V, D, bias=False)
        self.up, self.down = nn.Linear(D, model.d_ff), nn.Linear(model.d_ff, D)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        y_BTD = self.attention_norm(x_BTD)
        q, k, v = (
            project(y_BTD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        o_BHTV = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(o_BHTV.transpose(1, 2).flatten(2))
        y_BTD = F.gelu(self.up(self.feed_forward_norm(x_BTD)), approximate="tanh")
        return x_BTD + self.down(y_BTD)


class LanguageModel(nn.Module):
    """Learned positions and tied token table, both scaled by sqrt(D) on the way in; returns the loss, nats a token."""

    def __init__(self, run: RunSpec):
        super().__init__()
        model = run.model
        self.scale = model.d_model**0.5
        self.tokens = nn.Parameter(torch.randn(run.data.tokens, model.d_model) / self.scale)
        self.positions = nn.Parameter(torch.randn(model.max_length, model.d_model) / self.scale)
        self.blocks = nn.ModuleList(Block(model, heads) for heads in model.heads("decoder"))
        self.final_norm = nn.LayerNorm(model.d_model, eps=1e-6)

    def forward(self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = (F.embedding(inputs_BT, self.tokens) + self.positions[: inputs_BT.shape[1]]) * self.scale
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTC = F.linear(self.final_norm(x_BTD), self.tokens)
        return F.cross_entropy(logits_BTC.flatten(0, 1), targets_BT.flatten())


def optimizer_of(model: LanguageModel, run: RunSpec) -> torch.optim.Optimizer:
    """Fused AdamW at a constant rate; kernels decay, the rest does not."""
    spec = run.optimizer
    kernels = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    others = [p for p in model.parameters() if all(p is not kernel for kernel in kernels)]
    groups = [{"params": kernels, "weight_decay": spec.weight_decay}, {"params": others, "weight_decay": 0.0}]
    betas = (spec.beta1, spec.beta2)
    return torch.optim.AdamW(groups, lr=spec.learning_rate, betas=betas, eps=spec.epsilon, fused=True)


def torch_step(
    run: RunSpec, inputs_BT: np.ndarray, targets_BT: np.ndarray, *, compiled: bool, device: str, steps: int = 1
) -> Callable[[], float]:
    """Training steps on a fixed batch, eager or through torch.compile; returns the last loss when they are done.

    A run in bfloat16 computes under autocast, with parameters in float32 as ours; float32 products may shorten their
    mantissas where JAX's may, on a GPU.
    """
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    model = LanguageModel(run).to(device)
    optimizer = optimizer_of(model, run)
    loss_of = torch.compile(model) if compiled else model
    narrow = torch.autocast(device, torch.bfloat16, enabled=run.model.dtype == "bfloat16")
    inputs, targets = (torch.from_numpy(x.astype(np.int64)).to(device) for x in (inputs_BT, targets_BT))

    def step() -> float:
        loss = torch.zeros(())
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            with narrow:
                loss = loss_of(inputs, targets)
            loss.backward()
            optimizer.step()
        return loss.item()

    return step
