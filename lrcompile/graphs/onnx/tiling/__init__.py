"""Row tiles of ordinary ONNX graphs: which parts can be computed in pieces, which are worth it, how they are written.

The facts are measured (:mod:`sizes`), the rules are one for each kind of operator (:mod:`rows`), regions grow from the
values that are alive at the highest peak (:mod:`grow`, :mod:`choose`), and tiles are standard operators (:mod:`emit`).
"""

from lrcompile.graphs.onnx.tiling.plan import Tiling, tiled

__all__ = ["Tiling", "tiled"]
