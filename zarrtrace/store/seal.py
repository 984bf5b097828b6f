"""The seal of a group's ``zarr.json``: written with the file, and checked."""

from __future__ import annotations

import hashlib
import itertools
import re
from typing import Any

from zarrtrace.format.attributes import RunAttributes, TraceAttributes
from zarrtrace.format.index_layout import IndexAttributes
from zarrtrace.format.layout import PLAIN_COORDINATES
from zarrtrace.format.table_layout import TableAttributes
from zarrtrace.store.nodes import Nodes, encoded

_NO_SEAL = "0" * 16
_SEAL = re.compile(rb'"seal": "([0-9a-f]{16})"')
GROUP = {"zarr_format": 3, "node_type": "group"}
# No zarr.json has more texts that look like a seal.
_MOST_SEALS = 100


AnyAttributes = IndexAttributes | RunAttributes | TableAttributes | TraceAttributes


def sealed_group(attributes: AnyAttributes, nodes: Nodes | None) -> bytes:
    """Return the content of a group's ``zarr.json``, with consolidated metadata and seal.

    The seal is BLAKE2b (8 bytes) of this very file, with zeros in place of the seal.

    Parameters
    ----------
    nodes
        Metadata of all nodes below; None leaves consolidated metadata out.
    """
    plain = attributes.model_dump(mode="json", exclude={"seal"})
    if isinstance(attributes, IndexAttributes) and attributes.special:
        del plain["special"]  # indexes from before it could be chosen count special tokens
    if isinstance(attributes, TraceAttributes | TableAttributes) and nodes is not None:
        plain["coordinates"] = coordinate_names(nodes)
    plain["seal"] = _NO_SEAL
    group: dict[str, Any] = {"attributes": plain, **GROUP}
    if nodes is not None:
        group["consolidated_metadata"] = {
            "kind": "inline",
            "must_understand": False,
            "metadata": nodes,
        }
    content = encoded(group)
    # The attributes come first, and the seal is the last of them.
    end = len(b'{"attributes": ') + len(encoded(plain)) - len(b'"}')
    return content[: end - len(_NO_SEAL)] + _hash(content).encode() + content[end:]


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def seal_holds(content: bytes) -> bool:
    """Whether a group's ``zarr.json`` is the one that was written."""
    # Something else may be called so, in the configuration of a run.
    return any(
        _hash(content[: found.start(1)] + _NO_SEAL.encode() + content[found.end(1) :])
        == found.group(1).decode()
        for found in itertools.islice(_SEAL.finditer(content), _MOST_SEALS)
    )


def coordinate_names(nodes: Nodes) -> str:
    """Name the coordinates that are no index, as xarray reads them in an attribute."""
    names = [name for name in PLAIN_COORDINATES if name in nodes]
    along_sample = [name for name, node in nodes.items() if node["dimension_names"] == ["sample"]]
    saes = sorted(name for name in nodes if name.startswith("sae_"))
    return " ".join(dict.fromkeys([*names, *sorted(along_sample), *saes]))
