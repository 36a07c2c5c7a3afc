"""Computes and checks optimisation profiles: the ranges of shapes that a TensorRT engine takes.

TensorRT tunes its kernels for the `opt` shape of a profile and reserves memory for its `max` shape. So an engine for
texts of all lengths has several profiles, and (batch, sequence) of each stays within a budget of tokens.
"""

from collections.abc import Sequence
from pathlib import Path

from gte_deploy.core.errors import InputError
from gte_deploy.core.options import natural
from gte_deploy.core.spec import Profile

TOKEN_BUDGET = 32_768
"""The most rows times tokens of a batch: the runtime's budget on a GPU."""
MAX_PROFILES = 8
MAX_MASKS = 512
"""The most mask positions of one run; the runtime splits batches with more."""

_OPT_TOKENS = 4096
_MAX_ROWS = 256
_LENGTH_LIMITS = (128, 512)
_QUANTILES = (0.5, 0.95)
# Tokens of all texts in a padding-free batch.
_PACKED_LIMITS = (512, 4096)
# Tokens of one text, if no lengths are given.
_TYPICAL_LENGTH = 128
_MAX_FILE_BYTES = 1 << 28


def default_profiles(max_length: int) -> tuple[Profile, ...]:
    """Profiles for short, middle and long texts: up to 128, 512 and `max_length` tokens."""
    ends = [*(limit for limit in _LENGTH_LIMITS if limit < max_length), max_length]
    return tuple(_profile(start + 1, (start + 1 + end) // 2, end) for start, end in zip([0, *ends], ends, strict=False))


def profiles_for_lengths(lengths: Sequence[int], max_length: int) -> tuple[Profile, ...]:
    """Profiles for a distribution of lengths in tokens: the shorter half, up to the 95th percentile, and the rest.

    Each profile is tuned for the median of its lengths. The last one goes up to `max_length`.
    """
    import numpy as np

    clipped = np.clip(np.sort(np.asarray(lengths, np.int64)), 1, max_length)
    # Multiples of 8, the unit of tensor cores.
    limits = {min(max_length, -(-int(np.quantile(clipped, share)) // 8) * 8) for share in _QUANTILES}
    ends = sorted({*limits, max_length})
    profiles = []
    for start, end in zip([0, *ends], ends, strict=False):
        inside = clipped[(clipped > start) & (clipped <= end)]
        profiles.append(_profile(start + 1, int(np.median(inside)) if len(inside) else (start + 1 + end) // 2, end))
    return tuple(profiles)


def read_lengths(path: Path) -> list[int]:
    """Read a file of lengths: one integer per line, in tokens, special tokens included.

    Raises:
        InputError: the file cannot be read, or a line is not a positive integer.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise InputError(f"{path} has {path.stat().st_size:,} bytes; a sample of a million lengths is enough")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}. Expected one length in tokens per line.") from error
    lengths = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not (length := natural(line.strip())):
            raise InputError(f"{path}, line {number}: {line[:40]!r} is not a length in tokens, such as 128")
        lengths.append(length)
    if not lengths:
        raise InputError(f"{path} holds no length; expected one length in tokens per line")
    return lengths


def parse_profile(text: str) -> Profile:
    """Parse a profile such as "1x1:8x128:32x512", batch x sequence at min, opt and max.

    Raises:
        InputError: the text has another form, or the sizes are not in the order min, opt, max.
    """
    try:
        low, opt, high = (_pair(size) for size in text.split(":"))
        return Profile(low, opt, high)
    except ValueError as error:
        raise InputError(
            f"the profile {text!r} is not of the form MIN:OPT:MAX with BATCHxSEQUENCE, such as 1x1:8x128:32x512 "
            f"({error})"
        ) from error


def check_profiles(profiles: Sequence[Profile], max_length: int) -> None:
    """Check that an engine with these profiles takes texts up to `max_length`, and none above.

    Raises:
        InputError: no profile takes the longest input, or a profile goes beyond it; the message gives the lengths.
    """
    _check_number(profiles)
    for profile in profiles:
        if profile.max[1] > max_length:
            raise InputError(
                f"the profile {profile} goes to {profile.max[1]:,} tokens, and the longest input has {max_length:,} "
                "(--max-len)"
            )
    if (longest := max(profile.max[1] for profile in profiles)) < max_length:
        raise InputError(
            f"the longest profile ends at {longest:,} tokens, and inputs may have {max_length:,}: add a profile, or "
            f"export with --max-len {longest}"
        )


def packed_profiles(max_length: int, lengths: Sequence[int] = ()) -> tuple[Profile, ...]:
    """Profiles of a padding-free engine, (texts, tokens of all texts), for small, middle and large batches.

    Each profile is tuned for half its tokens, in texts of the median length in `lengths` if there are any.
    """
    typical = sorted(lengths)[len(lengths) // 2] if lengths else _TYPICAL_LENGTH
    profiles = []
    for tokens in (*_PACKED_LIMITS, max(TOKEN_BUDGET, max_length)):
        half = tokens // 2
        texts = min(_MAX_ROWS, max(1, half // typical))
        profiles.append(Profile((1, 1), (texts, half), (_MAX_ROWS, tokens)))
    return tuple(profiles)


def check_packed_profiles(profiles: Sequence[Profile], max_length: int) -> None:
    """Check that a padding-free engine with these profiles, (texts, tokens of all texts), takes `max_length` tokens.

    Raises:
        InputError: no profile takes such a text; a profile has more texts than tokens; or a profile does not begin at
            1x1, which would cause needless padding.
    """
    _check_number(profiles)
    for profile in profiles:
        if profile.min != (1, 1) or any(texts > tokens for texts, tokens in (profile.opt, profile.max)):
            raise InputError(
                f"the profile {profile} does not suit a padding-free engine, whose profiles are texts x tokens of "
                "all texts and begin at 1x1, such as 1x1:32x2048:256x4096"
            )
    if (most := max(profile.max[1] for profile in profiles)) < max_length:
        raise InputError(
            f"the largest profile ends at {most:,} tokens of all texts, and one text may have {max_length:,}: add a "
            f"profile, or export with --max-len {most}"
        )


def mask_profile(profile: Profile) -> tuple[int, int, int]:
    """Mask positions at min, opt and max; opt has one per row."""
    most = min(MAX_MASKS, profile.max[0] * profile.max[1])
    return 1, min(profile.opt[0], most), most


def _check_number(profiles: Sequence[Profile]) -> None:
    if not 1 <= len(profiles) <= MAX_PROFILES:
        raise InputError(f"there are {len(profiles)} profiles; an engine has 1 to {MAX_PROFILES}")


def _profile(shortest: int, typical: int, longest: int) -> Profile:
    rows = min(_MAX_ROWS, max(1, TOKEN_BUDGET // longest))
    return Profile((1, shortest), (min(rows, max(1, _OPT_TOKENS // typical)), typical), (rows, longest))


def _pair(text: str) -> tuple[int, int]:
    batch, sequence = text.split("x")
    return int(batch), int(sequence)
