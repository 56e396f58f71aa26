"""The frameworks' own layers: how their leaves lie, and what each leaf does alone."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from parity.frameworks.flax.leaves import find_leaf
from parity.frameworks.torch.leaves import from_numpy, to_numpy
from parity.weights.layouts import Layout, Shape


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf and the layer that owns it.

    Attributes:
        kind: of the layer: linear, embedding, norm, batch norm, convolution or transposed
            convolution; parameter or buffer for a leaf of no known layer.
        role: of the leaf in it: weight, bias, mean or var.
        layout: of the leaf, if the other framework's has its usual layout.
        shape: of the joined form, alike in both frameworks.
        part: of the layer, where it holds several of a kind, as a recurrent one does.
    """

    kind: str
    role: str
    layout: Layout
    shape: Shape
    part: str = ""


Act = Callable[[np.ndarray], np.ndarray]
_WINDOWS = torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d
_CONVOLUTIONS = {3: "conv1d", 4: "conv2d", 5: "conv3d"}
_KINDS = {
    torch.nn.Linear | nnx.Linear | nnx.LinearGeneral: "linear",
    torch.nn.Embedding | nnx.Embed: "embedding",
    torch.nn.LayerNorm | torch.nn.RMSNorm | torch.nn.GroupNorm: "norm",
    nnx.LayerNorm | nnx.RMSNorm | nnx.GroupNorm: "norm",
    torch.nn.modules.batchnorm._BatchNorm | nnx.BatchNorm: "batch norm",
    _WINDOWS | nnx.Conv: "convolution",
    torch.nn.modules.conv._ConvTransposeNd | nnx.ConvTranspose: "transposed convolution",
}
_TORCH_ROLES = {"running_mean": "mean", "running_var": "var"}
_FLAX_ROLES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}
_WINDOW_LAYOUTS = {"convolution": Layout.CONV, "transposed convolution": Layout.CONV_TRANSPOSE}


def torch_leaf(module: torch.nn.Module, name: str) -> Leaf | None:
    """Describe a leaf of a module; None for a count or a mask, which is no weight."""
    tensor = module.state_dict()[name]
    shape = tuple(tensor.shape)
    if not tensor.is_floating_point():
        return None
    part = ""
    if isinstance(module, torch.nn.MultiheadAttention) and name.startswith("in_proj"):
        kind, role = "linear", name.removeprefix("in_proj_")
    elif isinstance(module, torch.nn.RNNBase) and name.startswith(("weight", "bias")):
        kind, (role, _, part) = "linear", name.partition("_")
    else:
        kind = "linear" if _is_conv1d(module) else _kind(module)
        role = _TORCH_ROLES.get(name, name)
    if not kind or role not in ("weight", "bias", "mean", "var"):
        loose = "parameter" if name in dict(module.named_parameters(recurse=False)) else "buffer"
        return Leaf(loose, "weight", Layout.SAME, shape)
    layout = Layout.SAME
    if role == "weight" and kind == "linear" and not _is_conv1d(module):
        layout = Layout.TRANSPOSED
    elif role == "weight":
        layout = _WINDOW_LAYOUTS.get(kind, Layout.SAME)
    return Leaf(kind, role, layout, joined_shape(shape, layout, "torch"), part)


def flax_leaf(module: nnx.Module, name: str) -> Leaf:
    """Describe a leaf of a module."""
    found = find_leaf(module, name)
    shape = found.array.shape
    role = name.rpartition(".")[2] if isinstance(module, nnx.bridge.ToNNX) else name
    kind, role = _kind(module) or _linen_kind(module, name), _FLAX_ROLES.get(role, role)
    if not kind or role not in ("weight", "bias", "mean", "var"):
        # The scales of a weight norm are trained although they are plain arrays.
        is_parameter = isinstance(found.variable, nnx.Param) or isinstance(module, nnx.WeightNorm)
        loose = "parameter" if is_parameter else "buffer"
        return Leaf(loose, "weight", Layout.SAME, shape)
    layout = Layout.SAME
    if isinstance(module, nnx.LinearGeneral) and len(shape) == 3 and role == "weight":
        layout = Layout.HEADS_OUT if len(module.out_features) == 2 else Layout.HEADS_IN
    elif isinstance(module, nnx.LinearGeneral) and len(shape) == 2 and role == "bias":
        layout = Layout.FLAT
    elif isinstance(module, nnx.ConvTranspose) and role == "weight":
        turned = module.transpose_kernel
        layout = Layout.CONV_TRANSPOSE_KERNEL if turned else Layout.CONV_TRANSPOSE
    joined = joined_shape(shape, layout, "flax")
    if layout is Layout.CONV_TRANSPOSE_KERNEL:
        joined = (*joined[:-2], joined[-1], joined[-2])
    return Leaf(kind, role, layout, joined)


def torch_action(module: torch.nn.Module, leaf: str) -> Act | None:
    """Return what a leaf does to rows (N, in), to ids (N,), or in a convolution to (N, *space, in).

    Outputs come last. A bias is added; the caller subtracts the output for zeros. None where the
    leaf cannot be run alone.
    """
    parameter: torch.Tensor = getattr(module, leaf)
    if isinstance(module, torch.nn.Linear) and type(module).forward is not torch.nn.Linear.forward:
        return _on_arrays(lambda x: x @ parameter.T, parameter)  # a subclass may add anything
    if isinstance(module, torch.nn.Linear | torch.nn.Embedding) or _is_conv1d(module):
        return _on_arrays(module, parameter)
    if isinstance(module, torch.nn.MultiheadAttention) or (
        isinstance(module, torch.nn.RNNBase) and leaf.startswith("weight")
    ):
        return _on_arrays(lambda x: torch.nn.functional.linear(x, parameter), parameter)
    if isinstance(module, _WINDOWS):
        return _on_arrays(lambda x: _convolve(x, parameter, module.groups), parameter)
    return None


def flax_action(module: nnx.Module, leaf: str) -> Act | None:
    """Return the same for a flax leaf, to be run in the caller's `jax_scope`."""
    if isinstance(module, nnx.Linear) and type(module).__call__ is not nnx.Linear.__call__:
        return lambda x: np.asarray(x @ module.kernel[...])
    if isinstance(module, nnx.Linear | nnx.Embed):
        return lambda x: np.asarray(module(jnp.asarray(x)))
    if isinstance(module, nnx.LinearGeneral):
        shape = -1, *module.in_features
        return lambda x: np.asarray(module(jnp.asarray(x.reshape(shape)))).reshape(len(x), -1)
    if isinstance(module, nnx.Conv):
        kernel = module.kernel[...]
        window = "XYZ"[: kernel.ndim - 2]
        convolve = jax.lax.conv_general_dilated
        settings = dict(
            window_strides=(1,) * len(window),
            padding="VALID",
            dimension_numbers=(f"N{window}C", f"{window}IO", f"N{window}C"),
            feature_group_count=module.feature_group_count,
        )
        return lambda x: np.asarray(convolve(jnp.asarray(x), kernel, **settings))
    return None


def flax_input(module: nnx.Module, rng: np.random.Generator) -> np.ndarray:
    """Draw an input for `flax_action` of a module, in float64 or of ids."""
    if isinstance(module, nnx.Embed):
        return np.arange(min(module.num_embeddings, 64), dtype=np.int64)
    if isinstance(module, nnx.Conv):
        window = module.kernel.shape[:-2]
        return rng.normal(size=(2, *(size + 1 for size in window), module.in_features))
    return rng.normal(size=(3, int(np.prod(cast(nnx.Linear, module).in_features))))


def flax_owner(module: nnx.Module, leaf: str) -> tuple[nnx.Module, str]:
    """Return the module that owns a leaf, and the leaf's name in it."""
    found = find_leaf(module, leaf)
    return found.owner, found.name


def torch_owner(module: torch.nn.Module, leaf: str) -> tuple[torch.nn.Module, str]:
    """Return the module that owns a leaf, and the leaf's name in it."""
    path, _, name = leaf.rpartition(".")
    return module.get_submodule(path), name


def _kind(module: object) -> str:
    return next((kind for types, kind in _KINDS.items() if isinstance(module, types)), "")


def _linen_kind(module: nnx.Module, name: str) -> str:
    """Return the kind of the linen layer that a leaf of a bridged module belongs to."""
    if not isinstance(module, nnx.bridge.ToNNX):
        return ""
    leaves: object = vars(module)
    for key in name.split(".")[:-1]:
        leaves = leaves.get(key, {}) if isinstance(leaves, Mapping) else {}
    siblings = leaves if isinstance(leaves, Mapping) else {}
    axes = {x: np.ndim(siblings[x].get_value()) for x in siblings if x in _FLAX_ROLES}
    if "mean" in siblings:
        return "batch norm"
    if "kernel" in axes and axes["kernel"] != 3:  # a head axis, or a window
        return "linear" if axes["kernel"] == 2 else "convolution"
    return "embedding" if "embedding" in axes else "norm" if "scale" in axes else ""


def _is_conv1d(module: torch.nn.Module) -> bool:
    """Whether this is transformers' linear layer of GPT-2, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and not isinstance(module, torch.nn.Conv1d)


def _on_arrays(function: Callable[[torch.Tensor], torch.Tensor], parameter: torch.Tensor) -> Act:
    def act(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return to_numpy(function(from_numpy(x).to(parameter.device)))

    return act


def _convolve(x: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor:
    function = getattr(torch.nn.functional, _CONVOLUTIONS[weight.ndim])
    return function(x.movedim(-1, 1), weight, groups=groups).movedim(1, -1)


def joined_shape(shape: Shape, layout: Layout, framework: str) -> Shape:
    """Return the shape in flax's order of axes with all heads in one, outputs last."""
    if framework == "torch":
        window = shape[2:]
        match layout:
            case Layout.TRANSPOSED:
                return shape[::-1]
            case Layout.CONV | Layout.CONV_TRANSPOSE_KERNEL:
                return (*window, shape[1], shape[0])
            case Layout.CONV_TRANSPOSE:
                return (*window, shape[0], shape[1])
    match layout:
        case Layout.HEADS_OUT:
            return shape[0], shape[1] * shape[2]
        case Layout.HEADS_IN:
            return shape[0] * shape[1], shape[2]
        case Layout.FLAT:
            return (shape[0] * shape[1],)
    return shape
