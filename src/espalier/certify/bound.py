"""An upper bound on the ℓ2 Lipschitz constant of a network, from its operations as they really happen.

A copy of the network is run on a value that carries its bound (``espalier.certify.bounded``), so that a module counts
as often as it is used, and hooks, patches, functional calls, operations in place and broadcasting count where they
happen. On the way, the rule of a layer class, or the constant that a layer states, is used as long as the layer runs
the code of that class; every other module is followed into its forward pass.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from espalier.certify import code, elementwise, linear, orthogonium, shapes
from espalier.certify.arithmetic import unit, up
from espalier.certify.bounded import Analysis, Bounded, bounded_in
from espalier.certify.counts import another
from espalier.certify.layers import RULES, Layer, Rounding, Statement
from espalier.certify.operations import Call
from espalier.certify.plain_passes import compare_plain_passes
from espalier.certify.refusal import UncertifiableError
from espalier.certify.surroundings import interference, odd_settings
from espalier.certify.trail import digest_of
from espalier.certify.value import Bound, Term
from espalier.certify.wrappers import unwrapped
from espalier.contents import without_numbers
from espalier.errors import EspalierError, told
from espalier.nn.lipschitz.activations import Abs, GroupSort
from espalier.nn.lipschitz.constant import Lipschitz, LipschitzComposite
from espalier.nn.lipschitz.normalisation import Normalize, NormalizedLinear
from espalier.nn.lipschitz.pooling import InvertibleDownsampling
from espalier.nn.lipschitz.residual import ConvexSum, LinearResidual

# They state their own.
for _cls in (Abs, ConvexSum, GroupSort, InvertibleDownsampling, LinearResidual, Normalize, NormalizedLinear):
    code.record(_cls)


def lipschitz_bound(net: nn.Module, example: Tensor | None = None) -> float:
    """Return an upper bound on the ℓ2 Lipschitz constant of ``net`` with its present weights and mode.

    It is about the map in real arithmetic; the operators of orthogonal layers are measured as they are kept, in
    float64. Every operation of the forward pass needs a rule, or a module around it whose class has one or states its
    constant; everything else is refused by name.

    Args:
        net: the network, its input normalisation included.
        example: images (B, …) of the size in question. Without it, what depends on the size is refused, and it cannot
            be seen whether the network does the same on plain tensors.

    Raises:
        UncertifiableError: an operation or a module without a known finite constant, with the path of the module.
    """
    if example is not None:
        check_numbers("example is", example)
    analysis = Analysis(rounding=False)
    with prepared(net, None if example is None else torch.float64, analysis) as twin:
        images = None if example is None else example.detach().to(device_of(twin), torch.float64)
        result = analysis.run(twin, analysis.start(images)).bound
        # Is it the same map again, and of one image, which could be taken for none (squeeze)?
        analysis.run(twin, analysis.start(None if images is None else images[:1]))
        if images is not None:
            compare_plain_passes(twin, analysis, images)
    if not math.isfinite(result.lipschitz):
        raise UncertifiableError(f"its constant is {result.lipschitz}: are its weights finite?", type(net).__name__)
    return result.lipschitz


@contextmanager
def prepared(net: nn.Module, dtype: torch.dtype | None, analysis: Analysis) -> Iterator[nn.Module]:
    """Yield a copy as ``prepare`` makes it, without gradients, in the precision of its tensors.

    Raises:
        EspalierError: what is given is no module, or has no numbers.
        UncertifiableError: see ``prepare``; or the network itself is not what it was before: only its copy was run.
    """
    if not isinstance(net, nn.Module):
        raise EspalierError(f"net is of type {type(net).__name__}: give a torch.nn.Module")
    tensors = [*net.parameters(), *net.buffers()]
    if any(map(is_lazy, tensors)):
        raise EspalierError("net has weights without a shape before its first call: run a batch first")
    if any(hasattr(tensor, "to_local") for tensor in tensors):
        raise EspalierError("net is in shards (FSDP2, DTensor): load its whole weights into a copy that is not sharded")
    if any(map(without_numbers, tensors)):
        raise EspalierError("net has no numbers (its tensors are meta or fake ones): load its weights first")
    before = digest_of(net, functions=False)
    twin = prepare(net, dtype, analysis)
    with torch.no_grad(), plain_arithmetic(twin):
        yield twin
    if digest_of(net, functions=False) != before:
        raise UncertifiableError("bounding a copy of it changed the network itself: does a hook or a closure hold it?",
                                 type(net).__name__)  # fmt: skip


def prepare(net: nn.Module, dtype: torch.dtype | None, analysis: Analysis) -> nn.Module:
    """Return a copy of a network in one precision that can be run on values with bounds.

    Compiled and wrapped models (``torch.compile``, DataParallel, DistributedDataParallel, AveragedModel) are taken for
    the module inside, which computes the same; ``analysis`` notes the wrappers.

    Args:
        net: the network; it is left alone.
        dtype: of its floating parameters and buffers; None keeps theirs.
        analysis: what the copy notes its modules in.

    Raises:
        UncertifiableError: it cannot be copied, or a wrapper does more than call the module inside.
    """
    orthogonium.enter_rules()
    if any(module._compiled_call_impl is not None for module in net.modules()):  # compiled in place
        analysis.wrappers["torch.compile"] = None
    net = unwrapped(net, analysis.wrappers)
    try:
        twin = copy.deepcopy(net)
        for mine, copied in zip(net.modules(), twin.modules(), strict=False):
            copied.training = mine.training  # a constructor that makes a copy anew forgets it
    except Exception as error:
        raise UncertifiableError(
            f"it cannot be copied ({told(error)}): if it keeps tensors that it computed of its weights, fix these "
            "first (prune.remove, remove_parametrizations)", type(net).__name__,
        ) from error  # fmt: skip
    _check_copy(net, twin)
    if dtype is not None:  # as a user converts it: ``to`` would drop imaginary parts, too
        twin = twin.double() if dtype == torch.float64 else twin.float()
    for parent in twin.modules():
        for name, child in parent._modules.items():
            if child is not None:
                parent._modules[name] = unwrapped(child, analysis.wrappers)
    for path, module in twin.named_modules():
        vars(module)["forward"] = _Watched(module, path, module.forward, analysis)
    return twin


def check_numbers(what: str, item: Any) -> None:
    """Refuse what is no tensor of at least one number.

    Raises:
        EspalierError: see above.
    """
    if not isinstance(item, Tensor):
        raise EspalierError(f"{what} of type {type(item).__name__}: give a torch.Tensor")
    strange = item.layout != torch.strided or without_numbers(item) or item.is_quantized or item.is_complex()
    strange = strange or (item.is_floating_point() and item.element_size() == 1)
    if strange or item.ndim == 0 or item.numel() == 0:
        form = (
            "quantised" if item.is_quantized else f"{item.layout}, {item.dtype}, {tuple(item.shape)}, on {item.device}"
        )
        raise EspalierError(f"{what} {form}: give a dense tensor of real numbers, one entry per image")


def _check_copy(net: nn.Module, twin: nn.Module) -> None:
    """Refuse a copy that shares something with the network, or is another one: what is done to it would show there."""
    kind = type(net).__name__
    mine = {id(part) for part in (*net.modules(), *net.parameters(), *net.buffers())}
    if any(id(part) in mine for part in (*twin.modules(), *twin.parameters(), *twin.buffers())):
        raise UncertifiableError("a copy of it shares modules or tensors with it: remove its own __deepcopy__", kind)
    if digest_of(net, functions=False) != digest_of(twin, functions=False):
        raise UncertifiableError("a copy of it has other attributes than it: remove its own __getstate__", kind)


def device_of(net: nn.Module) -> torch.device:
    """Return the device of a network's tensors, the CPU if it has none."""
    return next((tensor.device for tensor in (*net.parameters(), *net.buffers())), torch.device("cpu"))


def plain_arithmetic(net: nn.Module) -> torch.autocast:
    """Return a context in which a network runs in the precision of its tensors."""
    return torch.autocast(device_of(net).type, enabled=False)


@dataclass
class _Watched:
    """The forward pass of one module of a prepared network."""

    module: nn.Module
    path: str
    forward: Callable[..., Any]
    analysis: Analysis

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it; a layer that is given one value with a bound, and has a rule or a constant, uses it."""
        given = list(bounded_in(args, kwargs))
        kind, analysis = type(self.module).__name__, self.analysis
        label = f"{self.path} ({kind})" if self.path else kind
        analysis.path.append(label)
        if not given:
            try:
                return analysis.watch.module(self.path, self.module, Call(self.forward, args, kwargs))
            finally:
                analysis.path.pop()
        analysis.calls += 1
        calls, before = analysis.calls, given[0].bound
        try:
            alone = len(args) == 1 and not kwargs and isinstance(args[0], Bounded)
            result = self._alone(args[0]) if alone else self.forward(*args, **kwargs)
            if not alone:
                self._tell(math.inf)
        except EspalierError as error:
            if isinstance(error, UncertifiableError) and not error.module:
                raise analysis.refuse(str(error)) from None
            analysis.failed = analysis.failed or error
            raise
        except Exception as error:
            if isinstance(analysis.failed, UncertifiableError):  # what torch made of a refusal on its way here
                raise analysis.failed from error
            raise analysis.refuse(f"its forward pass fails on a value with a bound: {told(error)}") from error
        finally:
            analysis.path.pop()
        if analysis.calls == calls and isinstance(result, Bounded) and alone:
            analysis.note(label, before, result.bound)
        return result

    def _alone(self, x: Bounded) -> Any:
        """Run it on one value, and tell the modules around it what its constant is."""
        if not self.analysis.runs:
            return self._by_rule(x)
        before, version = x.bound, x.memory.version
        with self.analysis.follow(before) as run:
            result = self._by_rule(x)
            made = self.analysis.read(result, "it").lipschitz if isinstance(result, Bounded) else math.inf
        known = run.alone and before.lipschitz > 0 and code.is_bare(self.module) and x.memory.version == version
        constant = made / before.lipschitz if known else math.inf
        self._tell(constant if constant * before.lipschitz >= made else math.nextafter(constant, math.inf))
        return result

    def _tell(self, constant: float) -> None:
        for run in self.analysis.runs:
            run.constants[self.module] = max(constant, run.constants.get(self.module, 0.0))

    def _by_rule(self, x: Bounded) -> Any:
        module, analysis, reason = self.module, self.analysis, None
        known = next((cls for cls in type(module).__mro__ if cls in RULES), None)
        if known is not None:
            rule, reason = RULES[known], code.change(module, known, self.forward, analysis.verified)
            if isinstance(rule, Statement):
                reason = reason or code.change_inside(module)
            reason = reason or odd_settings(module)
            if reason is None and isinstance(rule, Statement):
                return self._declared(x, partial(rule.constant, module), rule.rounding)
            if reason is None and isinstance(rule, Layer):
                given = analysis.read(x, "it")
                analysis.trail.add(analysis.named(given))
                analysis.trail.add_module(module)
                if odd := interference((), "cpu", analysis.modes, layer=True):
                    raise UncertifiableError(f"it {odd}")
                with analysis.watch.aside():
                    made = analysis.number(rule.function(analysis, module, given, self.forward))
                return self._as_one(x, Bounded(made, analysis, x.memory if rule.alias else None))
        statement, composite, why = self._own_statement()
        if statement is not None:
            return self._composed(x, statement) if composite else self._declared(x, statement)
        if reason or why:
            analysis.notes[analysis.path[-1]] = reason or why or ""
        return self.forward(x)

    def _own_statement(self) -> tuple[Callable[..., float | None] | None, bool, str | None]:
        """Return how a class states its constant, whether by those of modules inside, and why that is not used."""
        module, cls = self.module, type(self.module)
        for protocol, method in ((LipschitzComposite, "lipschitz_constant_from"), (Lipschitz, "lipschitz_constant")):
            if not isinstance(module, protocol):
                continue
            code.record(cls)
            reason = code.self_declared(cls, method) or code.change(module, cls, self.forward, self.analysis.verified)
            composite = method == "lipschitz_constant_from"
            if not composite:  # the other asks the modules inside, hooks and all
                reason = reason or code.change_inside(module) or odd_settings(module)
            return None if reason else getattr(module, method), composite, reason
        return None, False, None

    def _composed(self, x: Bounded, statement: Callable[..., float | None]) -> Any:
        """Use a constant that is stated by those of the modules inside, as far as the forward pass shows these."""
        analysis, bound, failed = self.analysis, self.analysis.read(x, "it"), self.analysis.failed
        if bound.value is None:
            return self._declared(x, partial(statement, self._of_child))
        done = analysis.watch.steps_done()
        try:
            with analysis.follow(bound) as run:
                result = self.forward(x)
                made = analysis.read(result, "it") if isinstance(result, Bounded) else None
        except UncertifiableError:
            if analysis.rounding:
                raise
            analysis.failed = failed
            analysis.watch.go_back(done)  # it is one step then, not what was done of it
            return self._declared(x, partial(statement, self._of_child))
        try:
            stated = statement(run.constants.__getitem__)
        except (KeyError, UncertifiableError):  # it asks for another module
            return result
        analysis.trail.add(stated)
        if made is not None and run.alone and stated is not None and 0 <= stated < math.inf:
            total = up(float(stated), bound.lipschitz)
            if total < made.lipschitz and result is not x:
                result.bound = analysis.number(replace(made, lipschitz=total))
        return result

    def _of_child(self, child: nn.Module) -> float:
        """Return the constant of a module inside, whatever the size of its input."""
        analysis = self.analysis
        probe, begun, before = analysis.probe(), len(analysis.numbers), digest_of(child)
        with analysis.follow(analysis.number(probe.bound)) as run:
            result = child(probe)
            if not isinstance(result, Bounded):
                raise analysis.refuse("a module inside does not return one tensor")
            made = analysis.read(result, "it")
        analysis.over.append(range(begun, len(analysis.numbers)))
        if probe.memory.version:
            raise analysis.refuse("a module inside changes its input in place: give an example=")
        if not run.alone or digest_of(child) != before:
            raise analysis.refuse("a module inside uses more than its input, or keeps something: give an example=")
        return made.lipschitz

    def _declared(self, x: Bounded, constant: Callable[[], float | None], rounding: Rounding | None = None) -> Any:
        """Use a stated constant; with numbers the forward pass is followed, too, for its rounding."""
        analysis, bound = self.analysis, self.analysis.read(x, "it")
        failed = analysis.failed
        try:
            with analysis.watch.aside():
                stated = constant()
        except UncertifiableError:
            if bound.value is None:
                raise
            analysis.failed = failed
            return self.forward(x)
        if stated is None:
            return self.forward(x)
        stated = float(stated)
        analysis.trail.add(stated, analysis.named(bound))
        analysis.trail.add_module(self.module)
        if not (math.isfinite(stated) and stated >= 0):
            raise UncertifiableError(f"its constant is {stated}: are its weights finite?")
        total = up(stated, bound.lipschitz)
        if bound.value is None:
            return self._as_one(x, Bounded(analysis.number(Bound(None, total)), analysis, x.memory))
        if not analysis.rounding or rounding is not None:
            with analysis.watch.aside():
                value = self._on_numbers(bound.value)
                relative, absolute = map(float, rounding(self.module, unit(value.dtype)) if rounding else (0.0, 0.0))
                if not (0 <= relative < math.inf and 0 <= absolute < math.inf):
                    raise UncertifiableError(f"its rounding is {relative}, {absolute}: give finite numbers from 0")
                made = analysis.number(analysis.combine(value, [Term(bound, stated, relative)], absolute=absolute))
            return self._as_one(x, Bounded(made, analysis, x.memory))
        analysis.notes[analysis.path[-1]] = "its constant is stated, its rounding is not: see register_lipschitz"
        result = self.forward(x)
        if isinstance(result, Bounded) and result.bound.lipschitz > total:
            result.bound = analysis.number(replace(result.bound, lipschitz=total))
        return result

    def _on_numbers(self, given: Tensor) -> Tensor:
        """Return the result of the forward pass as it is, which must be one value per image."""
        images, count, before = given.clone(), another(len(given)), digest_of(self.module)
        value = self.forward(images)
        if not torch.equal(given, images) or not isinstance(value, Tensor) or value.shape[:1] != given.shape[:1]:
            raise UncertifiableError("it changes its input in place, or does not return one value per image")
        try:
            fits = self.forward(given[:1].repeat(count, *[1] * (given.ndim - 1))).shape == (count, *value.shape[1:])
        except RuntimeError:
            fits = False
        if not fits:  # it may have taken the images of a batch for the channels of one
            raise UncertifiableError(f"it takes {len(given)} images and not {count}: is the batch in front?")
        if digest_of(self.module) != before:
            raise UncertifiableError("it keeps something of a run, where other modules may find it")
        return value

    def _as_one(self, given: Bounded, made: Bounded) -> Bounded:
        """Return a result that was bounded without a look at the operations inside."""
        self.analysis.watch.layer(self.path, self.module, given, made)
        return made


del elementwise, linear, shapes
