"""The zoo: small networks, each with one thing that makes pruning hard, on which every invariant runs.

    @pytest.mark.parametrize("entry", ZOO.values(), ids=ZOO)
    def test_masked_equals_lowered(entry: ZooEntry) -> None:
        model = entry.build().double().eval()
        inputs = entry.inputs(batch=5, dtype=torch.float64)
        ...

Every network is the same at each build, and alive: its outputs respond to the input in evaluation too. One forward pass
at 16x16 takes a few milliseconds.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tests.nets import attention, families, modes, movement, parameters, plain, residual, sequences, vision

SIZE = 16


@dataclass(frozen=True)
class ZooEntry:
    """One network of the zoo.

    Attributes:
        name: its key in ZOO.
        make: the class or function that makes it.
        images: how many positional inputs it takes, each [batch, 3, height, width].
        kind: another shape of the inputs: "signal" [batch, 3, length], "video" [batch, 3, 4, height, width],
            "latent" [batch, 8, 1, 1], "vector" [batch, 8], "named" a dict of two images.
        fixed_size: the original itself accepts 16x16 alone.
        shape_branch: Python control flow looks at the size, so one trace may serve sizes on its own side only.
        has_rng: a forward pass in training draws random numbers.
    """

    name: str
    make: Callable[[], nn.Module]
    images: int = 1
    kind: Literal["image", "signal", "video", "latent", "vector", "named"] = "image"
    fixed_size: bool = False
    shape_branch: bool = False
    has_rng: bool = False

    def build(self) -> nn.Module:
        """A fresh instance in training mode, float32, the same one every time; the global RNG stays as it is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(self.name.encode()))
            model = self.make()
            enliven(model, self.inputs(batch=8, seed=1))
        return model

    def inputs(
        self,
        batch: int = 2,
        height: int = SIZE,
        width: int = SIZE,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Any, ...]:
        """The positional inputs, drawn from `seed` alone: noise whose brightness and contrast differ image by image.

        Each is a tensor; the only one of kind "named" is a dict of tensors.
        """
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        shapes = {
            "image": (3, height, width),
            "named": (3, height, width),
            "signal": (3, height * width // 8),
            "video": (3, 4, height // 2, width // 2),
            "latent": (8, 1, 1),
            "vector": (8,),
        }
        shape = shapes[self.kind]
        ones = (1,) * (len(shape) - 1)
        images = [
            (draw(batch, *shape) * draw(batch, 1, *ones).exp() + draw(batch, shape[0], *ones)).to(dtype)
            for _ in range(2 if self.kind == "named" else self.images)
        ]
        return ({"image": images[0], "depth": images[1]},) if self.kind == "named" else tuple(images)

    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) pairs that one prepared network has to accept, the size it is prepared at first."""
        if self.fixed_size:
            return ((SIZE, SIZE),)
        return ((SIZE, SIZE), (12, SIZE)) if self.shape_branch else ((SIZE, SIZE), (12, 20), (24, SIZE))


def enliven(model: nn.Module, example: tuple[Any, ...]) -> None:
    """Weights that keep the signal's size, norms with random scales and shifts, BN statistics near the data's.

    At its start values a norm hides every mistake made with it, and a deep network hardly responds to its input.
    """
    kinds = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    norms = [m for m in model.modules() if isinstance(m, kinds)]
    for module in model.modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0.0, 0.3)
    batch_norms = [m for m in norms if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in batch_norms]
    for norm in batch_norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(*example)
    for norm, momentum in zip(batch_norms, momenta, strict=True):
        norm.momentum = momentum
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean += 0.2 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.7, 1.3)


_ENTRIES = (
    ZooEntry("plain", plain.plain),
    ZooEntry("vgg_flatten", plain.vgg_flatten, fixed_size=True),
    ZooEntry("vgg_pooled", plain.vgg_pooled, has_rng=True),
    ZooEntry("flatten_by_view", plain.FlattenByView, fixed_size=True),
    ZooEntry("conv_options", plain.conv_options),
    ZooEntry("activations", plain.activations),
    ZooEntry("group_norm", plain.group_norm),
    ZooEntry("layer_norm", plain.LayerNormBlock),
    ZooEntry("ends_in_conv", plain.ends_in_conv),
    ZooEntry("single_conv", plain.single_conv),
    ZooEntry("pixel_mixer", plain.PixelMixer),
    ZooEntry("cumulative_channels", plain.CumulativeChannels),
    ZooEntry("fourier_channels", plain.FourierChannels),
    ZooEntry("padded_average", plain.PaddedAverage),
    ZooEntry("affine", plain.Affine),
    ZooEntry("functional_layers", plain.FunctionalLayers),
    ZooEntry("resnet_projection", residual.resnet_projection),
    ZooEntry("resnet_padded", residual.resnet_padded),
    ZooEntry("resnet_bottleneck", residual.resnet_bottleneck),
    ZooEntry("resnext", residual.resnext),
    ZooEntry("inverted_residual", residual.inverted_residual),
    ZooEntry("depth_multiplier", residual.depth_multiplier),
    ZooEntry("squeeze_excite", residual.squeeze_excite),
    ZooEntry("squeeze_excite_hard", residual.squeeze_excite_hard),
    ZooEntry("preactivation", residual.preactivation),
    ZooEntry("three_way_sum", residual.ThreeWaySum),
    ZooEntry("subtract_and_multiply", residual.SubtractAndMultiply),
    ZooEntry("broadcast_sum", residual.BroadcastSum),
    ZooEntry("dense_block", movement.DenseBlock),
    ZooEntry("inception", movement.Inception),
    ZooEntry("shuffle_unit", movement.ShuffleUnit),
    ZooEntry("channel_shuffle", movement.channel_shuffle),
    ZooEntry("doubled_concat", movement.DoubledConcat),
    ZooEntry("unequal_split", movement.UnequalSplit),
    ZooEntry("raw_input_concat", movement.RawInputConcat),
    ZooEntry("unet", movement.UNet),
    ZooEntry("fully_convolutional", movement.FullyConvolutional),
    ZooEntry("super_resolution", movement.super_resolution),
    ZooEntry("transposed", movement.transposed),
    ZooEntry("rolled", movement.Rolled),
    ZooEntry("shared_conv", modes.SharedConv),
    ZooEntry("shared_head", modes.SharedHead),
    ZooEntry("dropouts", modes.Dropouts, has_rng=True),
    ZooEntry("stochastic_depth", modes.StochasticDepth, has_rng=True),
    ZooEntry("auxiliary_tuple", modes.AuxiliaryTuple),
    ZooEntry("auxiliary_dict", modes.AuxiliaryDict),
    ZooEntry("two_outputs", modes.TwoOutputs),
    ZooEntry("dict_output", modes.DictOutput),
    ZooEntry("shape_branch", modes.ShapeBranch, shape_branch=True),
    ZooEntry("loop_over_length", modes.LoopOverLength),
    ZooEntry("siamese", modes.Siamese, images=2),
    ZooEntry("global_mean", modes.GlobalMean),
    ZooEntry("unet_transposed", vision.UNetTransposed),
    ZooEntry("yolo_neck", vision.YoloNeck),
    ZooEntry("espcn", vision.espcn),
    ZooEntry("dcgan_generator", vision.dcgan_generator, kind="latent", fixed_size=True),
    ZooEntry("projected_latent", vision.ProjectedLatent, kind="vector", fixed_size=True),
    ZooEntry("style_transfer", vision.StyleTransfer),
    ZooEntry("normalised_scales", vision.NormalisedScales),
    ZooEntry("correlated", vision.Correlated, images=2),
    ZooEntry("unshuffled_stem", vision.UnshuffledStem),
    ZooEntry("group_norm_resnet", families.group_norm_resnet),
    ZooEntry("resnext_stages", families.resnext_stages),
    ZooEntry("shufflenet_v2", families.shufflenet_v2),
    ZooEntry("mobilenet_v2", families.mobilenet_v2, has_rng=True),
    ZooEntry("tied_autoencoder", parameters.TiedAutoencoder),
    ZooEntry("free_scales", parameters.FreeScales),
    ZooEntry("raw_parameters", parameters.RawParameters),
    ZooEntry("primary_capsules", parameters.PrimaryCapsules),
    ZooEntry("einsum_attention", attention.EinsumAttention),
    ZooEntry("convnext", attention.ConvNext),
    ZooEntry("mlp_mixer", attention.MlpMixer, fixed_size=True),
    ZooEntry("vit_module", attention.vit_module, fixed_size=True),
    ZooEntry("vit_by_hand", attention.vit_by_hand, fixed_size=True),
    ZooEntry("time_series", sequences.time_series, kind="signal"),
    ZooEntry("causal_net", sequences.CausalNet, kind="signal", has_rng=True),
    ZooEntry("factorised_video", sequences.factorised_video, kind="video"),
    ZooEntry("temporal_shift", sequences.TemporalShift, kind="video"),
)

ZOO: dict[str, ZooEntry] = {entry.name: entry for entry in _ENTRIES}

# Networks that one invariant does not apply to, although they are pruned as exactly as the others (tests/test_nets.py):
# Python's max() of sizes is guarded, recurrent layers are not stored when lowered, stored modules come back in another
# order, two keys of a state_dict are one parameter, or an input is no tensor.
_OTHERS = (
    ZooEntry("same_padding", families.same_padding),
    ZooEntry("recurrent_reader", sequences.RecurrentReader),
    ZooEntry("activated_norms", families.activated_norms),
    ZooEntry("tied_convs", parameters.TiedConvs),
    ZooEntry("frozen_resnet", families.frozen_resnet),
    ZooEntry("named_inputs", parameters.NamedInputs, kind="named"),
)

OTHERS: dict[str, ZooEntry] = {entry.name: entry for entry in _OTHERS}
