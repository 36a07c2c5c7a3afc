"""Files of a user's texts. Loads nothing heavy, so that a command refuses a bad file at once."""

from pathlib import Path

from gte_deploy.core.errors import InputError


def read_texts(path: Path) -> list[str]:
    """Return the lines of a user's file that are not blank.

    Raises:
        InputError: the file cannot be read as UTF-8 text, or has only blank lines.
    """
    try:
        texts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}. Expected UTF-8 with one text a line.") from error
    if not texts:
        raise InputError(f"{path} holds no text; expected UTF-8 with one text a line")
    return texts
