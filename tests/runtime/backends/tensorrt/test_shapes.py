"""Which profile runs a batch, how it is cut and padded, and that nothing is lost on the way."""

import dataclasses

import numpy as np
import pytest

from gte_deploy.backends.base import Batch
from gte_deploy.backends.tensorrt.shapes import (
    PaddedLayout,
    choose_profile,
    padded_length,
    padded_rows,
    split_batch,
    write_inputs,
)
from gte_deploy.core.errors import InputError
from gte_deploy.core.spec import Profile

SHORT = Profile((1, 1), (16, 64), (64, 128))
MIDDLE = Profile((1, 129), (8, 256), (16, 512))
LONG = Profile((1, 513), (2, 2048), (4, 8192))
PROFILES = (SHORT, MIDDLE, LONG)


def batch_of(rows, length, masks=None):
    ids = np.arange(rows * length).reshape(rows, length) + 1
    return Batch(ids, np.ones_like(ids), None if masks is None else np.array(masks, np.int64).reshape(-1, 2))


@pytest.mark.parametrize(
    ("rows", "length", "index"),
    [(1, 1, 0), (64, 128, 0), (1, 128, 0), (1, 129, 1), (16, 512, 1), (1, 513, 2), (4, 8192, 2), (200, 100, 0)],
)
def test_the_smallest_profile_that_takes_it(rows, length, index):
    assert choose_profile(PROFILES, rows, length) == index
    assert choose_profile(PROFILES[::-1], rows, length) == 2 - index


def test_overlapping_profiles():
    anything, tight = Profile((1, 1), (8, 512), (32, 8192)), Profile((1, 1), (8, 64), (8, 128))
    assert choose_profile((anything, tight), 8, 128) == 1
    assert choose_profile((anything, tight), 9, 128) == 0, "in one run rather than in two"
    wide, least = Profile((1, 128), (1, 128), (1, 128)), Profile((1, 1), (64, 64), (64, 512))
    assert choose_profile((wide, least), 1, 16) == 1, "the one that pads less comes before the smaller one"


def test_a_length_outside_every_profile_names_them():
    with pytest.raises(InputError, match=r"513 tokens.*1x1:16x64:64x128, 1x129:8x256:16x512\. .*--profile"):
        choose_profile((SHORT, MIDDLE), 1, 513)


def test_padded_lengths_are_few_and_little_longer():
    profile = Profile((1, 1), (1, 512), (1, 8192))
    found = [padded_length(length, profile) for length in range(1, 8193)]
    assert len(set(found)) == 112
    for length, padded in enumerate(found, 1):
        assert length <= padded <= max(length + 7, 1.0625 * length)
    assert padded_length(130, Profile((1, 200), (1, 200), (1, 300))) == 200
    assert padded_length(299, Profile((1, 200), (1, 200), (1, 299))) == 299


def test_padded_rows_are_few_and_not_many_more():
    profile = Profile((1, 1), (1, 512), (32, 512))
    found = [padded_rows(rows, profile) for rows in range(1, 33)]
    assert sorted(set(found)) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32]
    assert all(rows <= padded <= 1.2 * rows for rows, padded in enumerate(found, 1))
    assert sum(found) <= 1.06 * sum(range(1, 33))
    assert padded_rows(25, Profile((1, 1), (1, 512), (26, 512))) == 26
    (sub_batch,) = split_batch(batch_of(9, 20), PROFILES)
    assert PaddedLayout.with_common_shape(sub_batch, SHORT) == dataclasses.replace(sub_batch, shape=(10, 24))


def test_one_part_where_it_fits():
    (sub_batch,) = split_batch(batch_of(3, 20), PROFILES)
    assert (sub_batch.rows, sub_batch.profile, sub_batch.shape, sub_batch.num_masks) == (slice(0, 3), 0, (3, 24), 0)


def test_more_rows_than_the_profile_takes():
    sub_batches = list(split_batch(batch_of(9, 600), PROFILES))
    assert [sub_batch.rows for sub_batch in sub_batches] == [slice(0, 4), slice(4, 8), slice(8, 9)]
    assert [sub_batch.shape for sub_batch in sub_batches] == [(4, 608), (4, 608), (1, 608)]


def test_masks_go_with_their_rows_and_in_bounds():
    masks = [(8, 1), (0, 5), (4, 2), (0, 7), (3, 3), (0, 9)]
    sub_batches = list(split_batch(batch_of(9, 600, masks), PROFILES, [(1, 8), (1, 8), (1, 3)]))
    assert [(sub_batch.rows.start, sub_batch.masks.tolist(), sub_batch.num_masks) for sub_batch in sub_batches] == [
        (0, [1, 3, 4], 3),
        (0, [5], 1),
        (4, [2], 1),
        (8, [0], 1),
    ]
    (sub_batch,) = split_batch(batch_of(2, 4, []), PROFILES, [(1, 8)] * 3)
    assert len(sub_batch.masks) == 0 and sub_batch.num_masks == 1
    (sub_batch,) = split_batch(batch_of(2, 4), PROFILES, [(1, 8)] * 3)
    assert len(sub_batch.masks) == 0 and sub_batch.num_masks == 1
    (sub_batch,) = split_batch(batch_of(2, 4, [(0, 1)] * 5), PROFILES, [(1, 8)] * 3)
    assert sub_batch.num_masks == 8


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_inputs_are_padded_so_that_no_row_is_empty(dtype):
    batch = batch_of(3, 5, [(2, 4), (1, 1)])
    batch.attention_mask[0, 3:] = 0
    profile = Profile((2, 8), (2, 8), (2, 16))
    sub_batches = list(split_batch(batch, [profile], [(4, 8)]))
    assert [sub_batch.shape for sub_batch in sub_batches] == [(2, 8), (2, 8)]
    arrays = {name: np.full(shape, -7, dtype) for name, shape in (("input_ids", (2, 8)), ("attention_mask", (2, 8)))}
    arrays["mask_positions"] = np.full((4, 2), -7, dtype)
    write_inputs(batch, sub_batches[1], arrays, pad_token_id=9)
    assert arrays["input_ids"].tolist() == [[11, 12, 13, 14, 15, 9, 9, 9], [9] * 8]
    assert arrays["attention_mask"].tolist() == [[1] * 5 + [0] * 3, [1] + [0] * 7]
    assert arrays["mask_positions"].tolist() == [[0, 4], [0, 0], [0, 0], [0, 0]]
    write_inputs(batch, sub_batches[0], arrays, pad_token_id=9)
    assert arrays["attention_mask"].tolist() == [[1, 1, 1] + [0] * 5, [1] * 5 + [0] * 3]
    assert arrays["mask_positions"].tolist() == [[1, 1], [0, 0], [0, 0], [0, 0]]


def test_types_are_padded_with_type_0():
    batch = dataclasses.replace(batch_of(3, 5), token_type_ids=np.tile([0, 0, 1, 1, 1], (3, 1)))
    (first, last) = split_batch(batch, [Profile((2, 8), (2, 8), (2, 16))])
    names = ("input_ids", "attention_mask", "token_type_ids")
    arrays = {name: np.full((2, 8), -7, np.int64) for name in names}
    write_inputs(batch, first, arrays, pad_token_id=9)
    assert arrays["token_type_ids"].tolist() == [[0, 0, 1, 1, 1, 0, 0, 0]] * 2
    write_inputs(batch, last, arrays, pad_token_id=9)
    assert arrays["token_type_ids"].tolist() == [[0, 0, 1, 1, 1, 0, 0, 0], [0] * 8]
    write_inputs(dataclasses.replace(batch, token_type_ids=None), first, arrays, pad_token_id=9)
    assert not arrays["token_type_ids"].any()


def test_what_comes_back_is_put_in_its_place():
    layout = PaddedLayout(
        {
            "input_ids": ("batch", "sequence"),
            "mask_positions": ("masks", 2),
            "last_hidden_state": ("batch", "sequence", 3),
            "sentence_embedding": ("batch", 3),
            "logits": ("masks", 7),
        }
    )
    batch = batch_of(5, 6, [(4, 1), (0, 0), (2, 3), (3, 3)])
    whole = layout.shapes((5, 6), 4)
    assert whole["last_hidden_state"] == (5, 6, 3) and whole["logits"] == (4, 7) and whole["mask_positions"] == (4, 2)
    expected = {name: np.random.default_rng(0).random(whole[name], np.float32) for name in list(whole)[2:]}
    results = {name: np.full_like(values, np.nan) for name, values in expected.items()}
    for sub_batch in split_batch(batch, [Profile((1, 1), (2, 8), (2, 8))], [(1, 1)]):
        for name, values in expected.items():
            padded = np.full(layout.shapes(sub_batch.shape, sub_batch.num_masks)[name], -1, np.float32)
            chosen = values[sub_batch.masks] if name == "logits" else values[sub_batch.rows]
            padded[tuple(slice(size) for size in chosen.shape)] = chosen
            layout.place(name, padded, sub_batch, results[name])
    for name, values in expected.items():
        np.testing.assert_array_equal(results[name], values)
