"""route_rows: which rows run a unit and which take its stand-in."""

from dyncc.kernels.route_rows.truth import first_rows, router_scores, unit_scale

__all__ = ["first_rows", "router_scores", "unit_scale"]
