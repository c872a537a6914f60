"""Counts what a device is asked to do, on tensors without data: launches, operations, bytes moved, memory at the peak.

Inside a `Meter` everything on the "meta" device counts as the device's and everything on the CPU as the host's. Shapes
are real, numbers are not there, so a network of any size is counted in seconds and gives the same figures everywhere.

What counts:

- A launch is a call of one of torch's operations that computes: neither a view nor an allocation. Attention is one; so
  are RMS norm, which CUDA builds of torch have as one kernel, and the rotary product, which ComfyUI has as one. What a
  call sorts or pads inside is not looked into.
- Operations are those of matrix products, two a multiply-add, by the width of their inputs: torch's own formulas
  (torch.utils.flop_counter), and for attention 4 x batch x heads x queries x keys x head width.
- Bytes are those of distinct elements read and written, so that a broadcast input counts once. Elementwise work and
  copies are kept apart from matrix products and attention.
- A read-back is a number or a tensor that the host waits for. The numbers are made up: `READ_NUMBER`.
- Memory is that of storages made inside and still held, whoever holds them.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from math import prod
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
Kind = Literal["elementwise", "product", "attention"]
READ_NUMBER = 0.0123  # what every number that is read back seems to be
ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
OVERWRITES = {aten.copy_, aten.fill_, aten.zero_, aten.normal_, aten.uniform_}  # do not read what they change
NEW = {aten.new_zeros, aten.new_ones, aten.new_full, aten.zeros_like, aten.ones_like, aten.full_like}  # read nothing
PICKS = {aten.gather, aten.index, aten.index_select, aten.embedding}  # read no more of the first than they give
WHOLE = {aten.rms_norm}  # one kernel on a device, although torch has it in parts for others
NEEDS_CONTIGUOUS = {aten.native_layer_norm, aten.rms_norm}  # copy their input first where it is not


class Kernel(NamedTuple):
    """One launch, as far as its cost goes.

    Attributes:
        kind: what its time depends on.
        name: torch's for the operation.
        bits: width of a number of its first input.
        flops: operations of a matrix product.
        bytes: distinct elements read and written.
    """

    kind: Kind
    name: str
    bits: int
    flops: int
    bytes: int


@dataclass
class Work:
    """Launches, how often each, and read-backs; adds, subtracts and multiplies like a vector."""

    kernels: Counter[Kernel] = field(default_factory=Counter)
    read_backs: float = 0

    def __add__(self, other: "Work") -> "Work":
        return self.plus(other, 1)

    def __sub__(self, other: "Work") -> "Work":
        return self.plus(other, -1)

    def __mul__(self, factor: float) -> "Work":
        return Work().plus(self, factor)

    def plus(self, other: "Work", factor: float) -> "Work":
        """Adds another's, so many times."""
        kernels = Counter(self.kernels)
        for kernel, times in other.kernels.items():
            kernels[kernel] += times * factor  # type: ignore[assignment]
            if not kernels[kernel]:
                del kernels[kernel]
        return Work(kernels, self.read_backs + factor * other.read_backs)

    def to_list(self) -> list[list]:
        """Gives the launches in a form that JSON takes."""
        return [[*kernel, times] for kernel, times in self.kernels.items()]

    @classmethod
    def from_list(cls, kernels: list[list]) -> "Work":
        """Takes what `to_list` gave."""
        return cls(Counter({Kernel(*kernel): times for *kernel, times in kernels}))

    def only(self, *kinds: Kind) -> "Work":
        """Leaves out kernels of other kinds."""
        return Work(Counter({kernel: times for kernel, times in self.kernels.items() if kernel.kind in kinds}))

    @property
    def launches(self) -> float:
        return sum(self.kernels.values())

    @property
    def flops(self) -> float:
        return sum(kernel.flops * times for kernel, times in self.kernels.items())

    @property
    def bytes(self) -> float:
        return sum(kernel.bytes * times for kernel, times in self.kernels.items())

    @property
    def flops_by_bits(self) -> dict[int, float]:
        """Operations by the width of their inputs in bits, for those widths that there are."""
        by: Counter[int] = Counter()
        for kernel, times in self.kernels.items():
            if kernel.flops:
                by[kernel.bits] += kernel.flops * times
        return dict(sorted(by.items()))


def in_layers(one: Work, two: Work, layers: int) -> Work:
    """Gives the work of a network with so many layers from that of the same one with one and two: layers are alike."""
    return one.plus(two - one, layers - 1)


VIEW = "a view"


class Known(NamedTuple):
    """What an operation does with inputs of certain shapes.

    Attributes:
        kernels: launched.
        made: shape, strides and type of each result; None where the first input is changed and given back.
        one: whether the result is a tensor, not several.
        transient: bytes at its peak above those before it.
    """

    kernels: Counter[Kernel]
    made: list[tuple] | None
    one: bool
    transient: int


class Meter(TorchDispatchMode):
    """As a context: counts what is asked of the "meta" device.

    Attributes:
        work: what was counted outside of every named part.
        parts: what was counted inside of each.
        alive, peak: bytes of tensors made inside, now and at most since `reset_peak`.
    """

    # By operation and its inputs' shapes: torch works shapes out slowly, and forwards are alike.
    _known: ClassVar[dict[Hashable, Known | str]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, Work] = {}
        self.work = Work()
        self.alive = self.peak = 0
        self._now = self.work
        self._storages: dict[int, weakref.finalize] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what is asked inside under a name."""
        before, self._now = self._now, self.parts.setdefault(name, Work())
        try:
            yield
        finally:
            self._now = before

    def take(self) -> dict[str, Work]:
        """Gives what was counted since the last time, by part ("" outside of all), and starts anew."""
        counted = {"": self.work, **self.parts}
        self.work, self.parts = Work(), {}
        self._now = self.work
        return counted

    def reset_peak(self) -> None:
        """Forgets the peak so far."""
        self.peak = self.alive

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stands in for a fused kernel: q [B, heads, n, D], k and v [B, key heads, m, D] -> q's shape and layout."""
        self._now.kernels[attention_kernel(q.shape, k.shape, v.shape, q.itemsize)] += 1
        return torch.empty_like(q)

    def turn(self, x: Tensor, table: Tensor) -> Tensor:
        """Stands in for a fused rotary product of x [B, heads, tokens, D] with a table of matrices."""
        moved = 2 * distinct_bytes(x) + distinct_bytes(table)
        self._now.kernels[Kernel("elementwise", "rotary", 8 * x.itemsize, 0, moved)] += 1
        return torch.empty_like(x)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        key = _key(func, args, kwargs)
        known = self._known.get(key) if key else None
        if known == VIEW:
            return func(*args, **kwargs)
        if isinstance(known, Known):
            return self._again(known, args)
        result, mine, transient = self._measured(partial(self._run, func, args, kwargs))
        if key and not mine.read_backs:
            self._learn(key, func, args, kwargs, result, mine, transient)
        return result

    def once(self, key: Hashable, work: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """Does some work that makes new tensors, and where it was done under this key before, only counts it again."""
        known = self._known.get(key)
        if isinstance(known, Known):
            return self._again(known, ())
        made, mine, transient = self._measured(work)
        shapes = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in made]
        self._known[key] = Known(mine.kernels, shapes, False, transient)
        return made

    def _measured(self, work: Callable[[], Any]) -> tuple[Any, Work, int]:
        """Does some work, and tells what was counted and the bytes at its peak above those before."""
        self._now, now = Work(), self._now
        mine, peak, before = self._now, self.peak, self.alive
        self.peak = before
        try:
            result = work()
        finally:
            self._now = now
            now.kernels.update(mine.kernels)
            now.read_backs += mine.read_backs
            transient, self.peak = self.peak - before, max(peak, self.peak)
        return result, mine, transient

    def _again(self, known: Known, args) -> Any:
        """Gives what an operation gave on inputs of the same shapes, and counts it again."""
        self._now.kernels.update(known.kernels)
        self.peak = max(self.peak, self.alive + known.transient)
        if known.made is None:
            return args[0]
        fresh = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in known.made]
        for tensor in fresh:
            self._made(tensor)
        return fresh[0] if known.one else tuple(fresh)

    def _learn(self, key, func, args, kwargs, result, mine: Work, transient: int) -> None:
        """Remembers what an operation does with inputs of such shapes, where that is all that it depends on."""
        single = isinstance(result, Tensor)
        made: list[Any] = [result] if single else list(result) if isinstance(result, (tuple, list)) else [None]
        if not all(isinstance(tensor, Tensor) and tensor.is_meta for tensor in made):
            return
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        shared = [tensor.untyped_storage()._cdata in given for tensor in made]
        changed = _changed(func, args, kwargs)
        if changed:
            if single and len(changed) == 1 and result is changed[0] is args[0]:
                self._known[key] = Known(mine.kernels, None, True, transient)
        elif all(shared) and not mine.kernels:
            self._known[key] = VIEW
        elif not any(shared) and len({tensor.untyped_storage()._cdata for tensor in made}) == len(made):
            shapes = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in made]
            self._known[key] = Known(mine.kernels, shapes, single, transient)

    def _run(self, func, args, kwargs) -> Any:
        operation = func.overloadpacket
        if operation not in flop_registry and operation not in WHOLE and func is not torch.ops.prim.device.default:
            with self:  # under inference mode compound operations arrive whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        given = _tensors((args, kwargs))
        on_device = any(tensor.is_meta for tensor in given)
        if operation is aten._local_scalar_dense and on_device:
            self._now.read_backs += 1
            return READ_NUMBER
        if operation is aten._to_copy and on_device and not _stays(kwargs):
            self._now.read_backs += 1
            return torch.full(args[0].shape, READ_NUMBER, dtype=kwargs.get("dtype") or args[0].dtype)
        if operation is aten.copy_ and on_device and not args[0].is_meta:
            self._now.read_backs += 1
            return args[0]
        result = func(*args, **kwargs)
        made = _tensors(result)
        if not on_device and not any(tensor.is_meta for tensor in made):
            return result
        known = {tensor.untyped_storage()._cdata for tensor in given}
        fresh = [tensor for tensor in made if tensor.untyped_storage()._cdata not in known]
        for tensor in fresh:
            self._made(tensor)
        changed = _changed(func, args, kwargs)
        if operation not in ALLOCATIONS and any(tensor.numel() > 0 for tensor in (*fresh, *changed)):
            self._count(operation, args, kwargs, given, fresh, changed, result)
        return result

    def _count(self, operation, args, kwargs, given: list[Tensor], fresh: list[Tensor], changed: list[Tensor], result):
        unread = {id(tensor) for tensor in changed if operation in OVERWRITES or tensor is kwargs.get("out")}
        unread |= {id(tensor) for tensor in given if operation in NEW}
        reads = [distinct_bytes(tensor) for tensor in given if id(tensor) not in unread]
        writes = sum(distinct_bytes(tensor) for tensor in (*fresh, *changed))
        if operation in PICKS:
            reads[0] = min(reads[0], writes)
        first = given[0] if given else fresh[0]
        bits, name = 8 * first.itemsize, operation.__name__
        if operation in NEEDS_CONTIGUOUS and not first.is_contiguous():
            self._now.kernels[Kernel("elementwise", "contiguous", bits, 0, 2 * first.nbytes)] += 1
        if operation in flop_registry:
            inputs = [value for value in args if not isinstance(value, torch.dtype)]  # the formulas take no out_dtype
            flops = flop_registry[operation](*inputs, **kwargs, out_val=result)
            bits = 8 * max(tensor.itemsize for tensor in given if tensor.ndim > 1)
            kernel = Kernel("product", name, bits, flops, sum(reads) + writes)
        else:
            kernel = Kernel("elementwise", name, bits, 0, sum(reads) + writes)
        self._now.kernels[kernel] += 1

    def _made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not tensor.is_meta or key in self._storages:
            return
        self.alive += size
        self.peak = max(self.peak, self.alive)
        self._storages[key] = weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.alive -= size
        del self._storages[key]


def attention_kernel(q: torch.Size, k: torch.Size, v: torch.Size, itemsize: int) -> Kernel:
    """Gives the cost of attention over shapes [B, heads, n, D], [B, key heads, m, D] twice."""
    batch, heads, asked, width = q
    flops = 4 * batch * heads * asked * k[2] * width
    return Kernel("attention", "attention", 8 * itemsize, flops, itemsize * (2 * prod(q) + prod(k) + prod(v)))


def distinct_bytes(tensor: Tensor) -> int:
    """Counts the bytes of a tensor's elements, those that stand for several once."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    elements = prod(size for size, stride in strides if stride) if tensor.numel() else 0
    return tensor.itemsize * elements


def _changed(func, args, kwargs) -> list[Tensor]:
    """Inputs that an operation writes to."""
    named = func._schema.arguments
    values = [args[number] if number < len(args) else kwargs.get(one.name) for number, one in enumerate(named)]
    written = [value for one, value in zip(named, values, strict=True) if one.alias_info and one.alias_info.is_write]
    return _tensors(written)


@lru_cache(None)
def _numbers(func) -> tuple[frozenset[int], frozenset[str]]:
    """Places and names of an operation's inputs that are numbers, which no shape depends on."""
    found = [(place, one.name) for place, one in enumerate(func._schema.arguments) if str(one.type) == "number"]
    return frozenset(place for place, _ in found), frozenset(name for _, name in found)


def _key(func, args, kwargs) -> tuple | None:
    """An operation, the shapes of its inputs and which are the same one; None where not all are on the device."""
    places, names = _numbers(func)
    seen: list[int] = []

    def told(value) -> Any:
        if isinstance(value, Tensor):
            seen.append(id(value) if value.is_meta else 0)
            return value.shape, value.stride(), value.dtype
        return (*map(told, value),) if isinstance(value, (tuple, list)) else (type(value), value)

    first = [type(value) if place in places else told(value) for place, value in enumerate(args)]
    rest = [(name, type(value) if name in names else told(value)) for name, value in kwargs.items()]
    if 0 in seen or not seen:
        return None
    same = tuple(map(seen.index, seen)) if len(set(seen)) < len(seen) else ()
    return (func, same, *first, *rest)


def _tensors(tree) -> list[Tensor]:
    """All different tensors in it."""
    return list({id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}.values())


def _stays(kwargs) -> bool:
    """Whether a copy stays on the device."""
    device = kwargs.get("device")
    return device is None or torch.device(device).type == "meta"
