"""PyTorch's contestants: one causal self-attention layer by three cores, attention over a cache, a matrix product.

PyTorch is no requirement of this package; only the benchmarks read this file, where PyTorch is installed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]
from torch.nn.attention import SDPBackend, sdpa_kernel  # pyright: ignore[reportMissingImports]
from torch.nn.attention import flex_attention as flex  # pyright: ignore[reportMissingImports]

from mha_jax.benchmarks.programs import BOTH, Program
from mha_jax.cores import num_cores

Core = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
SDPA, FLEX, EAGER = "PyTorch SDPA", "PyTorch FlexAttention", "PyTorch eager"
FLASH, CUDNN = "PyTorch flash", "PyTorch cuDNN"


def tensor(array: Any, dtype: str, device: str) -> torch.Tensor:
    """An array of JAX or NumPy on PyTorch's device."""
    return torch.from_numpy(np.array(array, np.float32)).to(device, getattr(torch, dtype))


def _sdpa(length: int, device: str) -> Core:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _sdpa_by(kernel: Any) -> Callable[[int, str], Core]:
    """SDPA by this kernel alone; it raises where the kernel does not take the shape."""

    def make(length: int, device: str) -> Core:
        def core(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return core

    return make


def _eager(length: int, device: str) -> Core:
    hidden_TT = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)

    def core(q_BHTK: torch.Tensor, k_BHTK: torch.Tensor, v_BHTV: torch.Tensor) -> torch.Tensor:
        logits_BHTT = (q_BHTK * q_BHTK.shape[-1] ** -0.5) @ k_BHTK.transpose(-2, -1)
        return logits_BHTT.masked_fill(hidden_TT, -torch.inf).softmax(-1) @ v_BHTV

    return core


def _flex(length: int, device: str) -> Core:
    # Every head count and mode is a program of its own; past the limit the compiler would give up silently.
    torch._dynamo.config.recompile_limit = 64
    mask = flex.create_block_mask(lambda b, h, t, s: s <= t, None, None, length, length, device=device)
    attend: Any = torch.compile(flex.flex_attention, dynamic=False)
    return lambda q, k, v: attend(q, k, v, block_mask=mask)


CORES = {SDPA: _sdpa, FLEX: _flex, EAGER: _eager}
# What SDPA chooses from on a GPU.
GPU_CORES = {FLASH: _sdpa_by(SDPBackend.FLASH_ATTENTION), CUDNN: _sdpa_by(SDPBackend.CUDNN_ATTENTION)}


def cores(device: str) -> dict[str, Callable[[int, str], Core]]:
    """The ways that PyTorch has for attention on this device, by name."""
    return CORES | (GPU_CORES if device == "cuda" else {})


class Layer(nn.Module):
    """Causal self-attention with as many key/value heads as heads, without biases, on parameters of our layer.

    What kernels cost depends on what they are given: at logits of another size, a row's maximum moves less often.
    """

    def __init__(self, params: Any, core: Core):
        super().__init__()
        d_model, self.num_heads, _ = params["query"]["kernel"].shape
        self.core = core
        self.query, self.key, self.value, self.out = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        for name in ("query", "key", "value", "out"):
            kernel_XY = np.array(params[name]["kernel"], np.float32).reshape(d_model, d_model)
            getattr(self, name).weight.data = torch.from_numpy(kernel_XY.T.copy())

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            project(x_BTD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        return self.out(self.core(q, k, v).transpose(1, 2).flatten(2))


def layer_program(
    core: str, mode: str, params: Any, x_BTD: np.ndarray, cotangent_BTD: np.ndarray, dtype: str, device: str
) -> Program:
    """One call of the layer with this core; forward+backward gives y and the gradients of x and all parameters.

    Args:   params: of `our_layer`.
    Raises: whatever PyTorch does where the core cannot run here.
    """
    torch.set_num_threads(num_cores())
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    layer = Layer(params, cores(device)[core](x_BTD.shape[1], device)).to(device, getattr(torch, dtype))
    x, cotangent = tensor(x_BTD, dtype, device).requires_grad_(mode == BOTH), tensor(cotangent_BTD, dtype, device)

    def start() -> Sequence[torch.Tensor]:
        if mode == BOTH:
            y = layer(x)
            return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], cotangent)]
        with torch.no_grad():
            return [layer(x)]

    def wait(result: Sequence[torch.Tensor]) -> object:
        return _done(result, device)

    wait(start())  # compiles, and raises what must be told
    if device != "cuda":
        return Program(start, wait, None)
    torch.cuda.reset_peak_memory_stats()
    wait(start())
    return Program(start, wait, torch.cuda.max_memory_allocated() - before)


def cache_program(q_BHK: Any, k_BGSK: Any, v_BGSV: Any, layers: int, dtype: str, device: str) -> Callable[[], object]:
    """Attention of one query a row over the cached keys and values of every layer, with fewer groups than heads."""
    torch.set_num_threads(num_cores())
    q = tensor(q_BHK, dtype, device).unsqueeze(2)
    cache = [(tensor(k_BGSK, dtype, device), tensor(v_BGSV, dtype, device)) for _ in range(layers)]

    def call() -> Sequence[torch.Tensor]:
        with torch.no_grad():
            return _done([F.scaled_dot_product_attention(q, k, v, enable_gqa=True) for k, v in cache], device)

    return call


def product(a: np.ndarray, b: np.ndarray, dtype: str, device: str) -> Callable[[], object]:
    """The matrix product a @ b."""
    torch.set_num_threads(num_cores())
    left, right = tensor(a, dtype, device), tensor(b, dtype, device)
    return lambda: _done([left @ right], device)


def _done(result: Sequence[torch.Tensor], device: str) -> Sequence[torch.Tensor]:
    if device == "cuda":
        torch.cuda.synchronize()
    return result
