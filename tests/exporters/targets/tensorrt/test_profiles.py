"""Profiles: every length has one, batches stay within the budget, and what a user writes is read strictly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gte_deploy.core.errors import InputError
from gte_deploy.core.spec import Profile
from gte_deploy.exporters.targets.tensorrt.profiles import (
    MAX_MASKS,
    TOKEN_BUDGET,
    check_profiles,
    default_profiles,
    mask_profile,
    parse_profile,
    profiles_for_lengths,
    read_lengths,
)


def test_the_defaults_are_short_middle_and_long():
    assert [str(profile) for profile in default_profiles(8192)] == [
        "1x1:64x64:256x128",
        "1x129:12x320:64x512",
        "1x513:1x4352:4x8192",
    ]
    assert [profile.max[1] for profile in default_profiles(512)] == [128, 512]
    assert [profile.max[1] for profile in default_profiles(100)] == [100]


@given(st.integers(8, 8192))
def test_the_defaults_take_every_length_within_the_budget(max_length):
    profiles = default_profiles(max_length)
    check_profiles(profiles, max_length)
    _assert_complete(profiles, max_length)


@given(st.lists(st.integers(1, 20_000), min_size=1, max_size=50), st.integers(8, 8192))
def test_profiles_of_lengths_take_every_length_within_the_budget(lengths, max_length):
    profiles = profiles_for_lengths(lengths, max_length)
    check_profiles(profiles, max_length)
    _assert_complete(profiles, max_length)


def _assert_complete(profiles, max_length):
    assert profiles[0].min == (1, 1) and profiles[-1].max[1] == max_length
    for before, after in zip(profiles, profiles[1:], strict=False):
        assert after.min == (1, before.max[1] + 1)
    for profile in profiles:
        assert profile.max[0] * profile.max[1] <= max(TOKEN_BUDGET, profile.max[1])


def test_profiles_follow_the_lengths():
    lengths = [20] * 60 + [200] * 36 + [3000] * 4
    assert [(profile.opt[1], profile.max[1]) for profile in profiles_for_lengths(lengths, 8192)] == [
        (20, 24),
        (200, 200),
        (3000, 8192),
    ]


def test_a_profile_is_read_as_it_is_written():
    profile = parse_profile("1x1:8x128:32x512")
    assert profile == Profile((1, 1), (8, 128), (32, 512)) and str(profile) == "1x1:8x128:32x512"
    assert profile.takes(32, 512) and not profile.takes(33, 1) and not profile.takes(1, 513)


@pytest.mark.parametrize(
    "text",
    ["", "1x1", "1x1:2x2", "1x1:2x2:3x3:4x4", "1:2:3", "1x1:4x4:2x8", "0x1:1x1:1x1", "1x1:1x1:1x1x1", "axb:1x1:1x1"],
)
def test_what_is_no_profile_is_refused(text):
    with pytest.raises(InputError, match="MIN:OPT:MAX"):
        parse_profile(text)


def test_profiles_that_do_not_fit_the_lengths_are_refused():
    profile = parse_profile("1x1:8x128:32x512")
    check_profiles([profile], 512)
    with pytest.raises(InputError, match="--max-len 512"):
        check_profiles([profile], 1024)
    with pytest.raises(InputError, match="goes to 512"):
        check_profiles([profile], 256)
    with pytest.raises(InputError, match="0 profiles"):
        check_profiles([], 256)


def test_mask_positions_have_a_profile_too():
    assert mask_profile(parse_profile("1x1:8x128:32x512")) == (1, 8, MAX_MASKS)
    assert mask_profile(parse_profile("1x1:8x2:8x2")) == (1, 8, 16)


def test_a_file_of_lengths(tmp_path):
    file = tmp_path / "lengths.txt"
    file.write_text("12\n\n 7 \n8192\n")
    assert read_lengths(file) == [12, 7, 8192]


@pytest.mark.parametrize("text", ["", "\n", "12\nlong\n", "-3\n", "0\n", "1.5\n", "٣\n"])
def test_a_file_of_something_else_is_refused(text, tmp_path):
    file = tmp_path / "lengths.txt"
    file.write_text(text)
    with pytest.raises(InputError, match=r"lengths\.txt"):
        read_lengths(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_lengths(tmp_path / "nowhere.txt")
