"""The options for the texts that INT8 and FP8 are calibrated on."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gte_deploy.core.options import option

if TYPE_CHECKING:
    from gte_deploy.exporters.verification.texts import Languages


@dataclass(frozen=True)
class CalibrationOptions:
    """The calibration texts for INT8.

    Args:
        calibration: a UTF-8 file with one text per line, like the texts in production; None for built-in texts.
        languages: the built-in texts for calibration, and those that the accuracy is measured on: "english" prose,
            "multilingual" texts in 20 languages, or "auto" for the latter if the vocabulary has words of three scripts
            besides Latin.
    """

    calibration: Path | None = option(
        None,
        "UTF-8 file with your own texts, one per line (default: built-in texts)",
        metavar="FILE",
        parse=Path,
        precisions=("int8", "fp8"),
    )
    languages: "Languages" = option(
        "auto",
        "languages of the built-in texts, for calibration and for measuring the accuracy (default: several if the "
        "vocabulary has words of several scripts)",
        choices=("auto", "english", "multilingual"),
        precisions=("int8", "fp8"),
    )
