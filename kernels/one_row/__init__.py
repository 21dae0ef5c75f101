"""One query row a head over cached keys: four ops, their truths in ATen, and a C++ kernel that is generated for a CPU."""

from dyncc.kernels.one_row.best_pages import ATTEND_BEST_PAGES
from dyncc.kernels.one_row.op import ATTEND_ROW, SCORE_KEYS, SCORE_PAGES, SELECT_BEST, TRUTHS

__all__ = ["ATTEND_BEST_PAGES", "ATTEND_ROW", "SCORE_KEYS", "SCORE_PAGES", "SELECT_BEST", "TRUTHS"]
