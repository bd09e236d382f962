"""Example inputs: described, checked, guessed, made real again, and sent through a graph as shapes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils import _pytree as pytree

from dspfx.config import Inputs
from dspfx.errors import InputError
from dspfx.graph.layers import evaluated
from dspfx.graph.modes import evaluating
from dspfx.graph.samples import samples, with_samples
from dspfx.graph.traced import TracedModule, all_graphs

_GUESSED_SIZES = (224, 32, 64, 28, 128, 299, 256, 512)
# What fake tensors raise where the model needs the values of a real one.
_DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)
_ABOUT_FAKES = ("FakeTensor", "fake tensor", "data-dependent", "unbacked", "data pointer")
# Of images in a list: long and narrow, because detectors enlarge what they get to a fixed shorter or longer side.
_LISTED_SIZES = ((32, 512), (224, 224), (64, 64))


def describe_inputs(model: nn.Module, example_inputs: Any) -> Inputs:
    """Example inputs as meta tensors, after checking that the model runs on them.

    On fake tensors, so at no cost; only where these cannot tell (the model needs values) on real ones.
    """
    described, undecided = try_inputs(model, example_inputs)
    if undecided is not None:
        check_run(model, example_inputs)
    return described


def try_inputs(model: nn.Module, example_inputs: Any) -> tuple[Inputs, BaseException | None]:
    """(example inputs as meta tensors, None), or the error of fake tensors where only real ones can tell.

    Raises InputError where the model does not run on them.
    """
    inputs = Inputs.of(example_inputs)
    device = next((p.device for p in model.parameters()), None)
    for leaf in tensors_of(inputs):
        if device is not None and leaf.device not in (device, torch.device("meta")):
            raise InputError(
                f"the example input {tuple(leaf.shape)} is on {leaf.device}, the model on {device}; move one of them "
                f"with .to(...)."
            )
    described = describe(inputs.args, inputs.kwargs)
    try:
        _dry_run(model, described)
    except Exception as error:
        if needs_values(error):
            return described, error
        if device is not None and device.type == "meta":
            raise refusal(model, inputs, error) from error
        check_run(model, example_inputs)  # real tensors have the last word
    return described, None


def describe(args: Any, kwargs: Any) -> Inputs:
    """Arguments as Inputs whose tensors are on the meta device."""
    to_meta = lambda x: x.detach().to("meta") if isinstance(x, Tensor) else x  # noqa: E731
    return Inputs(*pytree.tree_map(to_meta, args), **pytree.tree_map(to_meta, kwargs))


def following(inputs: Inputs, module: nn.Module) -> Inputs:
    """Floating inputs in the one type that the module has: it may have been converted since it was traced."""
    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()}
    if len(dtypes) != 1:
        return inputs
    [dtype] = dtypes
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, (inputs.args, inputs.kwargs)
    )
    return Inputs(*args, **kwargs)


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """Every tensor of the inputs, in order."""
    return [x for x in pytree.tree_leaves((inputs.args, inputs.kwargs)) if isinstance(x, Tensor)]


def check_run(model: nn.Module, example_inputs: Any) -> None:
    """InputError unless the model runs on these inputs in eval mode; it is left as it was."""
    inputs = Inputs.of(example_inputs)
    try:
        run_real(model, inputs)
    except Exception as error:
        raise refusal(model, inputs, error) from error


def run_real(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output in eval mode on the inputs, those on the meta device made random; it is left as it was."""
    args, kwargs = realise(model, inputs)
    with as_found(model), evaluating([model]), torch.no_grad():
        return model(*args, **kwargs)


def realise(model: nn.Module, inputs: Inputs) -> tuple[Any, Any]:
    """(args, kwargs) that may be written to: copies of real tensors, random ones in place of meta tensors."""
    args, kwargs = materialise(model, describe(inputs.args, inputs.kwargs))
    given = pytree.tree_leaves((inputs.args, inputs.kwargs))
    made, spec = pytree.tree_flatten((args, kwargs))
    pairs = zip(given, made, strict=True)
    leaves = [x.detach().clone() if isinstance(x, Tensor) and not x.is_meta else y for x, y in pairs]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return args, kwargs


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Afterwards the model's buffers, modes and attributes and the random numbers to come are as before."""
    buffers = [(value, value.clone()) for value in model.buffers() if not value.is_meta]
    modules = [(module, Attributes(module)) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            for module, attributes in modules:
                attributes.put_back(module)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


class Attributes:
    """What a module's own `__dict__` holds now, to be put back after its forward may have assigned to it."""

    _REGISTRIES = ("_parameters", "_buffers", "_modules")

    def __init__(self, module: nn.Module) -> None:
        self.values = dict(module.__dict__)
        self.registries = {key: dict(module.__dict__[key]) for key in self._REGISTRIES}

    def put_back(self, module: nn.Module, keep: Callable[[str, Any], bool] = lambda key, value: False) -> None:
        """New attributes go (unless `keep`), changed ones are as they were."""
        now = module.__dict__
        for key in [key for key, value in now.items() if key not in self.values and not keep(key, value)]:
            del now[key]
        is_another_graph = "_graph" in now and now["_graph"] is not self.values["_graph"]
        now.update(self.values)
        for key, entries in self.registries.items():
            if [(k, id(v)) for k, v in now[key].items()] != [(k, id(v)) for k, v in entries.items()]:
                now[key].clear()
                now[key].update(entries)
        if is_another_graph and isinstance(module, fx.GraphModule):
            module.recompile()  # its forward, in its class, is the other graph's


def needs_values(error: BaseException) -> bool:
    """True for what fake tensors raise where the model needs the values of real ones."""
    text = str(error)
    return isinstance(error, _DATA_DEPENDENT) or any(word in text for word in _ABOUT_FAKES)


def refusal(model: nn.Module, inputs: Inputs, error: BaseException) -> InputError:
    """The error of a model that does not run on these inputs."""
    return InputError(
        f"{type(model).__name__} does not run on example inputs of shape {[tuple(x.shape) for x in tensors_of(inputs)]}"
        f": {last_line(error)}. Give example_inputs that the model accepts."
    )


def _dry_run(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output on fake tensors, in eval mode: no arithmetic, and the model is left as it was."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    args, kwargs = materialise(model, inputs, mode)
    with as_found(model), evaluating([model]), mode, torch.no_grad():
        return model(*args, **kwargs)


def materialise(model: nn.Module, inputs: Inputs, mode: FakeTensorMode | None = None) -> tuple[Any, Any]:
    """(args, kwargs) of the described inputs on the model's device: fake in `mode`, else random (integers zero)."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def make(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if mode is not None:
            with mode:
                return torch.empty(x.shape, dtype=x.dtype, device=device)
        generator = torch.Generator().manual_seed(x.numel())
        if x.is_floating_point():
            return torch.randn(x.shape, generator=generator, dtype=torch.float32).to(device, x.dtype)
        return torch.zeros(x.shape, dtype=x.dtype, device=device)

    return pytree.tree_map(make, inputs.args), pytree.tree_map(make, inputs.kwargs)


def guess_inputs(model: nn.Module) -> Inputs:
    """Inputs that the model accepts, from its first layer's width: a batch of two images, or a list of two.

    Raises InputError where none is found.
    """
    described, undecided = try_guess(model)
    if undecided is None:
        return described
    for candidate in real_candidates(model):
        try:
            run_real(model, candidate)
        except Exception:
            continue  # not this size; the last resort below says what to do
        return candidate
    raise _no_guess(model)


def try_guess(model: nn.Module) -> tuple[Inputs, BaseException | None]:
    """(a batch of images or rows that the model accepts, None), or the error of fake tensors that leaves it open.

    Raises InputError where the model accepts none.
    """
    for described in _batches(model):
        try:
            _dry_run(model, described)
        except Exception as error:
            if needs_values(error):
                return described, error
            continue  # not this size
        return described, None
    raise _no_guess(model)


def real_candidates(model: nn.Module) -> list[Inputs]:
    """What a model that needs values may accept: two images in a list (detectors), else in a batch."""
    lists = [
        Inputs([x.new_empty(x.shape[1], *size) for _ in range(x.shape[0])])
        for size in _LISTED_SIZES
        for x in tensors_of(_batches(model)[0])
        if x.dim() == 4
    ]
    return [*lists, *_batches(model)]


def _batches(model: nn.Module) -> list[Inputs]:
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))), None)
    shapes: list[tuple[int, ...]] = []
    if isinstance(first, nn.Linear):
        shapes = [(2, first.in_features)]
    elif first is not None:
        shapes = [(2, first.in_channels, size, size) for size in _GUESSED_SIZES]
    dtype = first.weight.dtype if first is not None else torch.float32
    return [Inputs(torch.empty(shape, dtype=dtype, device="meta")) for shape in shapes]


def _no_guess(model: nn.Module) -> InputError:
    shapes = [tuple(x.shape) for described in _batches(model) for x in tensors_of(described)]
    return InputError(
        f"no example inputs were given, and {type(model).__name__} accepts none of the shapes {shapes} that its "
        f"first layer suggests. Call again with example_inputs=torch.randn(...) of a shape the model accepts."
    )


def propagate(gm: TracedModule, inputs: Inputs) -> None:
    """Gives every node the value (`meta["val"]`, fake) it has on the described inputs, and remembers these."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for graph in all_graphs(gm):
        try:
            _Values(gm, graph=graph).run_on(mode, _flat(gm, inputs, mode))
        except ValueError:  # in training, batch norm refuses one value a channel: one image on a 1x1 map
            if samples(inputs) != 1:
                raise
            _Values(gm, graph=graph).run_on(mode, _flat(gm, with_samples(inputs, 2), mode))
    gm.meta["inputs"] = inputs


def _flat(gm: TracedModule, inputs: Inputs, mode: FakeTensorMode) -> list[Any]:
    args, kwargs = materialise(gm, inputs, mode)
    bound = inspect.signature(gm.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return list(bound.arguments.values())


class _Values(fx.Interpreter):
    def run_on(self, mode: FakeTensorMode, args: list[Any]) -> None:
        buffers = [(value, value.clone()) for value in self.module.buffers()]
        with mode, torch.no_grad():
            self.run(*args)
        for buffer, value in buffers:
            buffer.copy_(value)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        read = self.env.__getitem__
        return tuple(evaluated(a, read) for a in n.args), {k: evaluated(a, read) for k, a in n.kwargs.items()}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["val"] = value
        return value


def last_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
