"""What `nanokit evaluate --data` shows."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from nano.divergence import Figure
from nano.metrics import Scores

_SHOWN = ("Mean PPL(Q)/PPL(base)", "Median KLD", "90.0% KLD", "95.0% KLD", "99.0% KLD", "99.9% KLD", "Maximum KLD",
          "Mean Δp", "RMS Δp", "99.0% Δp", "1.0% Δp", "Same top p", "Flips")  # fmt: skip


def _figure_text(name: str, figure: Figure) -> str:
    """A divergence figure as llama.cpp prints it: probabilities and shares in per cent."""
    share = name.endswith("p") or name == "Flips"
    scale, unit, form = (100, " %", ".3f") if share else (1, "", ".6f")
    error = "" if figure.error is None else f" ± {figure.error * scale:{form}}"
    return f"{figure.value * scale:{form}}{error}{unit}{' (estimated)' if figure.estimated else ''}"


def scores_table(models: Mapping[str, str | None], scores: Scores) -> Table:
    """What was measured, a line each; what was not has none."""
    table = Table(show_header=False)
    rows = {
        **models,
        "perplexity": f"{scores.perplexity:.4f}",
        "tokens": f"{scores.tokens:,}",
        "perplexity of the reference": scores.reference_perplexity and f"{scores.reference_perplexity:.4f}",
        "KL, nats a token": scores.kl is not None and f"{scores.kl:.3g} ± {scores.kl_error:.2g}",
        "of that the stored sample's": scores.kl_sampling_error is not None and f"± {scores.kl_sampling_error:.2g}",
        "same most likely token": scores.top1 is not None and f"{scores.top1:.2%}",
        "relative logit error": scores.logit_error is not None and f"{scores.logit_error:.3%}",
        "accuracy of the most likely token": scores.accuracy is not None and f"{scores.accuracy:.2%}",
        "its calibration error": scores.calibration_error is not None and f"{scores.calibration_error:.2%}",
        **{name: _figure_text(name, figure) for name, figure in (scores.divergence or {}).items() if name in _SHOWN},
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    return table
