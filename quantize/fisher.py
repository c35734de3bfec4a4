"""How far the output distribution moves when one linear is rounded: a second-order estimate, one layer in memory.

For a small change dW of one linear's weight, the KL divergence of a text's next-token distributions is

    KL(p || p + dp) = 1/2 E_v[ <dL_v/dW, dW>^2 ] + third order,    L_v = sum over positions of <F^1/2 v, logits>

with v standard normal in R^V at each position and F^1/2 = diag(sqrt p)(I - sqrt(p) sqrt(p)^T), whose product with
its transpose is the Fisher matrix of a softmax, diag(p) - p p^T (Martens 2014, arXiv 1412.1193, sections 9 and 11).
One backward pass gives the inner product for every linear of a layer at once: with x the linear's input and g the
gradient at its output, <dL/dW, dW> = sum over positions of g . (dW x). Each window of text is a draw of its own, so
the relative standard error over S windows is sqrt(2 / S).

The pass goes forward once, keeping the hidden states between layers, and backward once, reading each layer again:
memory is one layer, its activations for a batch, and S x T x D numbers a layer.

Legend: S windows, b windows of a batch, T positions, D hidden width, V vocabulary, N output, K input channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nano.families import EMBEDDING, FINAL_NORM, HEAD, LAYER_LINEARS, family_of, layer_prefix
from nano.progress import track
from quantize.layers import Hidden, advance, embed, load_layer, run_layer
from quantize.student import Student

LOGITS_AT_ONCE = 1 << 25
"""Numbers of logits computed at once at the output."""


def estimate_kl(
    student: Student, changes: Mapping[str, Any], windows: Sequence[torch.Tensor], seed: int = 0
) -> dict[str, list[float]]:
    """The KL, in nats a token, that each change of one linear alone would cause.

    Args:
        student: the float model.
        changes: by module, a function from its weight (N, K) to a list of changes (N, K) to judge.
        windows: token ids.
        seed: of the random directions.

    Returns:
        By module, one estimate for each change.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers = student.shape.num_layers
    hidden = embed(student, list(windows))
    kept = []
    found: dict[str, list[float]] = {}
    with track("sensitivity", 2 * layers, "layer passes") as bar:
        for layer in range(layers):
            kept.append(hidden.x_STD.clone())
            model = load_layer(student, layer, device)
            advance(model, hidden, device)
            bar.advance()
        slope_STD = output_slope(student, hidden, seed)
        for layer in reversed(range(layers)):
            model = load_layer(student, layer, device)
            hidden.x_STD = kept.pop()
            names = [name for name in LAYER_LINEARS if layer_prefix(layer) + name in changes]
            deltas = {
                name: changes[layer_prefix(layer) + name](model.layers[0].get_submodule(name).weight) for name in names
            }
            sums = _backward(model, hidden, slope_STD, deltas, device)
            found.update({layer_prefix(layer) + name: values for name, values in sums.items()})
            bar.advance()
    positions = sum(hidden.length_S)
    return {name: [value / positions for value in found[name]] for name in changes}


@dataclass(frozen=True)
class Output:
    """The final norm and the head.

    Attributes:
        gain_D: what the normalised state is multiplied by.
        epsilon: added to the mean square.
        head_VD: the head's weight, as it is stored.
    """

    gain_D: torch.Tensor
    epsilon: float
    head_VD: torch.Tensor

    @classmethod
    def of(cls, student: Student) -> Output:
        """Read them."""
        name = EMBEDDING if student.shape.tied else HEAD
        gain_D = student.tensor(FINAL_NORM + ".weight").float() + family_of(student.shape.family).norm_offset
        epsilon = float(student.config.get("rms_norm_eps", 1e-6))
        return cls(gain_D, epsilon, student.tensor(name + ".weight"))

    def normed(self, x_PD: torch.Tensor) -> torch.Tensor:
        """What the head sees of the last layer's outputs (P, D)."""
        return x_PD * torch.rsqrt(x_PD.square().mean(-1, keepdim=True) + self.epsilon) * self.gain_D


def output_slope(student: Student, hidden: Hidden, seed: int) -> torch.Tensor:
    """Gradient (S, T, D) of sum <F^1/2 v, logits> at the last layer's output; zero where a window is padding."""
    generator, output = torch.Generator().manual_seed(seed), Output.of(student)
    windows, positions, width = hidden.x_STD.shape
    length_S1 = torch.tensor(hidden.length_S)[:, None]
    real_P = (torch.arange(positions)[None] < length_S1).flatten()
    x_PD = hidden.x_STD.reshape(-1, width)
    slope_PD = torch.zeros_like(x_PD)
    head_VD = output.head_VD.float()
    for rows in torch.split(real_P.nonzero().flatten(), max(1, LOGITS_AT_ONCE // len(head_VD))):
        x_rD = x_PD[rows].requires_grad_()
        logits_rV = output.normed(x_rD) @ head_VD.T
        root_rV = logits_rV.detach().softmax(-1).sqrt()
        v_rV = torch.randn(root_rV.shape, generator=generator)
        direction_rV = root_rV * (v_rV - root_rV * (root_rV * v_rV).sum(-1, keepdim=True))
        (slope_PD[rows],) = torch.autograd.grad(logits_rV, x_rD, direction_rV)
    return slope_PD.view(windows, positions, width)


def _backward(
    model: Any,
    hidden: Hidden,
    slope_STD: torch.Tensor,
    deltas: Mapping[str, Sequence[torch.Tensor]],
    device: torch.device,
) -> dict[str, list[float]]:
    """Half the summed squares of <dL/dW, dW>, window by window; `slope_STD` becomes the gradient at the input."""
    sums = {name: [0.0] * len(parts) for name, parts in deltas.items()}
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            seen[name] = (inputs[0].detach(), output)

        return hook

    handles = [model.layers[0].get_submodule(name).register_forward_hook(keep(name)) for name in deltas]
    try:
        for part, _ in hidden.batches():
            x_bTD = hidden.x_STD[part].to(device).requires_grad_()
            out_bTD = run_layer(model, x_bTD)
            outputs = [output for _, output in seen.values()]
            grads = torch.autograd.grad(out_bTD, [x_bTD, *outputs], slope_STD[part].to(device))
            slope_STD[part] = grads[0].to(slope_STD.device)
            for (name, (x_bTK, _)), g_bTN in zip(seen.items(), grads[1:], strict=True):
                for i, delta_NK in enumerate(deltas[name]):
                    moved_b = (torch.nn.functional.linear(x_bTK, delta_NK) * g_bTN).sum((1, 2))
                    sums[name][i] += 0.5 * float(moved_b.square().sum())
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    return sums


def standard_error(windows: int) -> float:
    """Relative standard error of an estimate over so many windows."""
    return math.sqrt(2 / windows)
