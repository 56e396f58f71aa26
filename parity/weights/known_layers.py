"""The frameworks' own layers: how their leaves lie, and what each leaf does alone."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch.nn.utils import parametrize

from parity.frameworks.flax.leaves import find_leaf
from parity.frameworks.torch.leaves import from_numpy, to_numpy


class Leaf(NamedTuple):
    """A leaf and the layer that owns it.

    Attributes:
        kind: of the layer: linear, embedding, norm, batch norm, convolution or transposed
            convolution; parameter or buffer for a leaf of no known layer.
        role: of the leaf in it: weight, bias, mean, var, or gain, the length that a weight norm
            gives to what is seen from an output; "" for a leaf of no known layer.
        axes: what its axes are, as in `Use`; "" where that is unknown.
        part: of the layer, where it holds several of a kind, as a recurrent one does.
    """

    kind: str
    role: str
    axes: tuple[str, ...]
    part: str = ""

    @property
    def is_known(self) -> bool:
        """Whether it belongs to a known layer."""
        return bool(self.role)


Act = Callable[[np.ndarray], np.ndarray]
_WINDOWS = torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d
_CONVOLUTIONS = {3: "conv1d", 4: "conv2d", 5: "conv3d"}
_KINDS = {
    torch.nn.Linear | nnx.Linear | nnx.LinearGeneral: "linear",
    torch.nn.Embedding | nnx.Embed: "embedding",
    torch.nn.LayerNorm | torch.nn.RMSNorm | torch.nn.GroupNorm: "norm",
    torch.nn.modules.instancenorm._InstanceNorm | nnx.InstanceNorm: "norm",
    nnx.LayerNorm | nnx.RMSNorm | nnx.GroupNorm: "norm",
    torch.nn.modules.batchnorm._BatchNorm | nnx.BatchNorm: "batch norm",
    _WINDOWS | nnx.Conv: "convolution",
    torch.nn.modules.conv._ConvTransposeNd | nnx.ConvTranspose: "transposed convolution",
}
_TORCH_ROLES = {"running_mean": "mean", "running_var": "var"}
_ROLES = "weight", "bias", "mean", "var", "gain"
_FLAX_ROLES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}
# torch.nn.utils.weight_norm, and the same as a parametrization.
_NORMED = {"weight_g": "gain", "weight_v": "weight"}
_PARAMETRIZED = {"original0": "gain", "original1": "weight"}


def torch_leaf(model: torch.nn.Module, path: str) -> Leaf:
    """Describe a leaf of a model."""
    module, name = torch_owner(model, path)
    tensor = getattr(module, name, None)
    if not isinstance(tensor, torch.Tensor):
        tensor = model.state_dict()[path]
    is_parameter = isinstance(tensor, torch.nn.Parameter)
    loose = Leaf("parameter" if is_parameter else "buffer", "", ("",) * tensor.ndim)
    part, kind, role = "", _kind(module), _TORCH_ROLES.get(name, name)
    if _is_conv1d(module):
        kind = "linear"
    if isinstance(module, torch.nn.MultiheadAttention) and name.startswith("in_proj"):
        kind, role = "linear", name.removeprefix("in_proj_")
    elif isinstance(module, torch.nn.RNNBase | torch.nn.RNNCellBase):
        kind, (role, _, part) = "linear", name.partition("_")
    elif kind and name in _NORMED:
        role = _NORMED[name]
    elif isinstance(module, parametrize.ParametrizationList) and name in _PARAMETRIZED:
        above = path.split(".")[:-3]
        kind, role = _kind(model.get_submodule(".".join(above))), _PARAMETRIZED[name]
    if not kind or role not in _ROLES:
        return loose
    if role != "weight":
        return Leaf(kind, role, ("",) * tensor.ndim, part)
    outer = ("i", "o") if "transposed" in kind or _is_conv1d(module) else ("o", "i")
    return Leaf(kind, role, _axes(kind, outer, tensor.ndim), part)


def flax_leaf(model: nnx.Module, path: str) -> Leaf:
    """Describe a leaf of a model."""
    found = find_leaf(model, path)
    module, name, num_axes = found.owner, found.name, np.ndim(found.array)
    last = name.rpartition(".")[2] if isinstance(module, nnx.bridge.ToNNX) else name
    kind, role = _kind(module) or _linen_kind(module, name), _FLAX_ROLES.get(last, last)
    if isinstance(module, nnx.WeightNorm):  # its scales are trained although they are plain arrays
        kind, role = _kind(module.layer_instance) or "linear", "gain"
    if not kind or role not in _ROLES:
        is_parameter = isinstance(found.variable, nnx.Param)
        return Leaf("parameter" if is_parameter else "buffer", "", ("",) * num_axes)
    if role != "weight":
        return Leaf(kind, role, ("",) * num_axes)
    if isinstance(module, nnx.LinearGeneral):
        shared = ("",) * len(module.batch_axis)
        outer = ("i",) * len(module.in_features), ("o",) * len(module.out_features)
        axes = (*shared, *outer[0], *outer[1])
    else:
        turned = isinstance(module, nnx.ConvTranspose) and module.transpose_kernel
        windows = num_axes - 2 if "convolution" in kind else 0
        if isinstance(module, nnx.Conv | nnx.ConvTranspose):
            windows = len(module.kernel_size)
        pair = _axes(kind, ("o", "i") if turned else ("i", "o"), 2 + windows)
        axes = pair if len(pair) < 3 else (*pair[2:], *pair[:2])
    # One more axis of a module that `nnx.vmap` made.
    return Leaf(kind, role, (*("",) * (num_axes - len(axes)), *axes)[-num_axes:])


def _axes(kind: str, outer: tuple[str, str], num_axes: int) -> tuple[str, ...]:
    """Return the axes of a weight of a kind in torch's order."""
    if kind in ("norm", "batch norm"):
        return ("",) * num_axes
    pair = ("i", "o") if kind == "embedding" else outer
    return (*pair, *(f"w{number}" for number in range(num_axes - 2)))


def are_one_kind(torch_module: torch.nn.Module, flax_module: nnx.Module) -> bool:
    """Whether two modules are layers of one kind, which take the same inputs."""
    linear = torch.nn.MultiheadAttention | torch.nn.RNNBase
    is_linear = isinstance(torch_module, linear) or _is_conv1d(torch_module)
    return ("linear" if is_linear else _kind(torch_module)) == _kind(flax_module)


def torch_action(module: torch.nn.Module, leaf: str) -> Act | None:
    """Return what a leaf does to rows (N, in), to ids (N,), or in a convolution to (N, *space, in).

    Outputs come last. A bias is added; the caller subtracts the output for zeros. None where the
    leaf cannot be run alone.
    """
    parameter: torch.Tensor = getattr(module, leaf)
    if leaf in _NORMED or not leaf.startswith(("weight", "bias", "in_proj")):
        return None  # the weight is made of several
    if isinstance(module, torch.nn.Linear) and type(module).forward is not torch.nn.Linear.forward:
        return _on_arrays(lambda x: x @ parameter.T, parameter)  # a subclass may add anything
    if isinstance(module, torch.nn.Embedding) and (
        type(module).forward is not torch.nn.Embedding.forward
    ):
        return None  # a subclass may take other ids
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
    is_stack = leaf != "bias" and "" in flax_leaf(module, leaf).axes[:1]
    if (leaf not in _FLAX_ROLES and leaf != "bias") or is_stack:
        return None  # a stack of several, or what only a subclass has
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
