"""The gates of `moecc.ir.gates` inside a kernel, in float32.

Every kernel that applies a gate calls `apply_gate`.
"""

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    # tl has no tanh, and the interpreter cannot run libdevice's
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def activation(x, ACT: tl.constexpr):
    """Return ACT(x) for one of the names in `moecc.ir.gates.ACTIVATIONS`."""
    if ACT == "silu":
        y = x * tl.sigmoid(x)
    elif ACT == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # (1 + tanh(z)) / 2 = sigmoid(2z)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "relu":
        y = tl.maximum(x, 0.0)
    elif ACT == "relu2":
        y = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    elif ACT == "sigmoid":
        y = tl.sigmoid(x)
    elif ACT == "tanh":
        y = _tanh(x)
    else:
        tl.static_assert(ACT == "identity")
        y = x
    return y


@triton.jit
def apply_gate(g, u, alpha, limit, ACT: tl.constexpr, GATE: tl.constexpr):
    """Return the hidden units of gate rows g and up rows u, tensors of the same shape."""
    if GATE == "glu" or GATE == "f32":
        h = activation(g, ACT) * u
    elif GATE == "clamp" or GATE == "clamp_f32":
        h = activation(tl.minimum(g, limit), ACT) * _between(u, limit)
    elif GATE == "clamp_after":
        h = tl.minimum(activation(g, ACT), limit) * _between(u, limit)
    elif GATE == "oai":
        g = tl.minimum(g, limit)
        h = (_between(u, limit) + 1) * (g * tl.sigmoid(g * alpha))
    else:
        tl.static_assert(GATE == "softcap")
        h = _tanh(g / alpha) * alpha * tl.sigmoid(g) * (_tanh(u / limit) * limit)
    return h


@triton.jit
def _between(u, limit):
    """Clamp u to [-limit, limit]."""
    return tl.minimum(tl.maximum(u, -limit), limit)
