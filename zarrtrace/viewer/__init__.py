"""A run in the browser.

One page is fed by a live server, a folder or a single HTML file. All three have the layout
of :mod:`zarrtrace.viewer.layout`, described in ``schema/README.md``.
"""

from __future__ import annotations

from zarrtrace.viewer.bundle import estimate, plan, write_bundle
from zarrtrace.viewer.layout import Layout
from zarrtrace.viewer.server import Server, serve

__all__ = ["Layout", "Server", "estimate", "plan", "serve", "write_bundle"]
