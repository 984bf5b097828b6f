"""Loading encoders one after another, the next ones while this one computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch

from zarrtrace.format.attributes import SAEAttributes
from zarrtrace.machine import memory_sizes, release_freed

if TYPE_CHECKING:
    from zarrtrace.capture.encoder import Encoder
    from zarrtrace.capture.saes import Found, SAESource

# Encoders are kept while this share of the memory of their device stays free.
_ROOM = 0.25
# Encoders that are loaded at once for a GPU with room: one is read, another is put together.
_AHEAD = 2


class Encoders:
    """The encoders of each layer, loaded in a known order; a context manager.

    Parameters
    ----------
    saes
        The SAEs of each layer that has some.
    source
        Where to load them from.
    device
        Where they compute.
    order
        Layers in the order in which :meth:`take` will ask for them, wave by wave. A wave is asked
        for once the encoders of those before are loaded: it may depend on which ones are kept.
    """

    def __init__(
        self,
        saes: Mapping[int, Sequence[SAEAttributes]],
        source: SAESource | None,
        device: torch.device,
        order: Iterable[Sequence[int]],
    ) -> None:
        self._saes, self._source, self._device = saes, source, device
        self._order, self._left = iter(order), deque[int]()
        has_room = device.type == "cuda" and _free_share(device) > _ROOM
        self._ahead = _AHEAD if has_room else 1
        self._pool = ThreadPoolExecutor(self._ahead, thread_name_prefix="zarrtrace-sae")
        self._next: deque[Future[list[Encoder]]] = deque()

    def __enter__(self) -> Self:
        for _ in range(self._ahead):
            self._prefetch()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _prefetch(self) -> None:
        while not self._left:
            wait(self._next)
            wave = next(self._order, None)
            if wave is None:
                return
            self._left.extend(wave)
        self._next.append(self._pool.submit(self._load, self._left.popleft()))

    def _load(self, layer: int) -> list[Encoder]:
        source, on_cpu = self._source, self._device.type == "cpu"
        if source is None:
            return []
        # A process is largest here: the encoder in use, this one's file and its parts. So what has
        # been freed is given back before, and what reading has freed right after.
        is_loaded = isinstance(source, KeptEncoders) and source.has(self._saes[layer], self._device)
        gives_back = on_cpu and not is_loaded
        if gives_back:
            release_freed()
        loaded = [source.load(attributes, self._device) for attributes in self._saes[layer]]
        if on_cpu:
            for encoder in loaded:
                encoder.split()
        if gives_back:
            release_freed()
        return loaded

    def take(self, layer: int) -> list[Encoder]:
        """Return the encoders of the next layer in order; none if `layer` has none."""
        if layer not in self._saes or not self._next:
            return []
        loaded = self._next.popleft().result()
        self._prefetch()
        return loaded


class KeptEncoders:
    """A source of SAEs that keeps those it has loaded, for a process that extracts many times.

    Parameters
    ----------
    source
        Where they come from. An SAE that no longer fits into a device's memory is loaded each time.
    """

    def __init__(self, source: SAESource) -> None:
        self._source = source
        self._kept: dict[tuple[str, str, str], Encoder] = {}

    @property
    def prepend_bos(self) -> bool | None:
        """Whether the SAEs were trained behind a BOS token."""
        return self._source.prepend_bos

    def available(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Return those of some layers that have an SAE."""
        return self._source.available(layers)

    def find(self, layers: Sequence[int]) -> Found:
        """Return the SAEs of each layer."""
        return self._source.find(layers)

    def stretches(self, saes: Sequence[SAEAttributes]) -> list[tuple[Path, int, int]]:
        """Say which bytes of which files are needed."""
        return self._source.stretches(saes)

    def has(self, saes: Sequence[SAEAttributes], device: torch.device) -> bool:
        """Whether some SAEs are loaded and kept."""
        return all(_key(one, device) in self._kept for one in saes)

    def load(self, attributes: SAEAttributes, device: torch.device) -> Encoder:
        """Return one encoder, loaded if need be."""
        key = _key(attributes, device)
        if key in self._kept:
            return self._kept[key]
        encoder = self._source.load(attributes, device)
        if _free_share(device) > _ROOM:
            self._kept[key] = encoder
        return encoder


def keeping(source: SAESource) -> KeptEncoders:
    """Return a source that keeps what it has loaded: this one, if it does."""
    return source if isinstance(source, KeptEncoders) else KeptEncoders(source)


def _key(attributes: SAEAttributes, device: torch.device) -> tuple[str, str, str]:
    return attributes.id, attributes.variable, str(device)


def _free_share(device: torch.device) -> float:
    """Return how much of a device's memory is free; 0 where the system does not say."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # Torch gives to others what it holds and does not use.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (free + unused) / total
    sizes = memory_sizes()
    return sizes.get("MemAvailable", 0) / sizes.get("MemTotal", 1)
