"""Reports as pages: figures drawn by matplotlib, and one self-contained HTML file with tables and figures."""

from mico.pages.figures import Figure, save_figures
from mico.pages.html import write_html
from mico.pages.run import headline, report_figures, write_run_page
from mico.pages.several import comparison_figures
from mico.pages.visual import visual_figures

__all__ = [
    "Figure", "comparison_figures", "headline", "report_figures", "save_figures", "visual_figures", "write_html",
    "write_run_page",
]  # fmt: skip
