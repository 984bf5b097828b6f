"""Loading encoders one after another, the next one while this one computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch

from zarrtrace.spec import SAEAttributes

if TYPE_CHECKING:
    from zarrtrace.capture.saes import Encoder, SAESource


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
        Layers in the order in which :meth:`take` will ask for them.
    """

    def __init__(
        self,
        saes: Mapping[int, Sequence[SAEAttributes]],
        source: SAESource | None,
        device: torch.device,
        order: Sequence[int],
    ) -> None:
        self._saes, self._source, self._device = saes, source, device
        self._order = iter(order)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="zarrtrace-sae")
        self._next: Future[list[Encoder]] | None = None

    def __enter__(self) -> Self:
        self._prefetch()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _prefetch(self) -> None:
        layer = next(self._order, None)
        self._next = None if layer is None else self._pool.submit(self._load, layer)

    def _load(self, layer: int) -> list[Encoder]:
        source = self._source
        if source is None:
            return []
        return [source.load(attributes, self._device) for attributes in self._saes[layer]]

    def take(self, layer: int) -> list[Encoder]:
        """Return the encoders of the next layer in order; none if `layer` has none."""
        if layer not in self._saes or self._next is None:
            return []
        loaded = self._next.result()
        self._prefetch()
        return loaded
