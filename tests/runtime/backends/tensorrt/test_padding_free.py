"""Texts in a row for a padding-free engine: how a batch is cut and packed, and that nothing is lost on the way."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gte_deploy.backends.base import Batch
from gte_deploy.backends.tensorrt.padding_free import PaddingFreeLayout, split_packed_batch
from gte_deploy.core.errors import InputError
from gte_deploy.core.spec import Profile

SMALL, LARGE = Profile((1, 1), (2, 32), (3, 64)), Profile((1, 1), (4, 256), (8, 512))
LAYOUT = PaddingFreeLayout(
    {
        "input_ids": ("tokens",),
        "position_ids": ("tokens",),
        "query_lengths": ("batch_and_one",),
        "kv_lengths": ("batch_and_one",),
        "mask_positions": ("num_masks",),
        "last_hidden_state": ("tokens", 2),
        "sentence_embedding": ("batch", 3),
        "logits": ("num_masks", 5),
    }
)


def batch_of(lengths, masks=None):
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    ids = np.where(mask == 1, np.arange(mask.size).reshape(mask.shape) + 1, 0)
    return Batch(ids, mask, None if masks is None else np.array(masks, np.int64).reshape(-1, 2))


def cut(lengths, masks=None, limits=None, profiles=(SMALL, LARGE)):
    return list(split_packed_batch(batch_of(lengths, masks), profiles, limits))


def arrays_for(sub_batch):
    shapes = LAYOUT.shapes(sub_batch.shape, sub_batch.num_masks)
    return {name: np.full(shapes[name], -7, np.int64) for name in list(LAYOUT.tensors)[:5]}


@pytest.mark.parametrize(
    ("lengths", "profile", "shape"),
    [
        ([16], 0, (1, 16)),  # as it is: no padding to add
        ([13], 0, (2, 16)),  # and a text of 3 tokens of padding
        ([13, 9], 0, (3, 24)),
        ([13, 9, 1], 0, (3, 23)),  # no text of the profile is left for padding
        ([60, 5], 1, (3, 72)),  # too many tokens for the small profile
        ([1, 1, 1, 1], 1, (5, 8)),  # too many texts
        ([64], 0, (1, 64)),
        ([5] * 6, 1, (7, 32)),  # a text of padding; the numbers of texts are few from 8 on
    ],
)
def test_the_smallest_profile_and_few_counts_of_tokens(lengths, profile, shape):
    (sub_batch,) = cut(lengths)
    assert (sub_batch.profile, sub_batch.shape, sub_batch.rows) == (profile, shape, slice(0, len(lengths)))


def test_texts_of_padding_make_the_numbers_of_texts_few():
    many = Profile((1, 1), (32, 256), (32, 512))
    assert [cut([5] * count, profiles=(many,))[0].shape for count in (8, 9)] == [(8, 40), (10, 48)]
    for count, tokens in ((17, 88), (18, 96), (19, 96)):
        batch = batch_of([5] * count)
        (sub_batch,) = split_packed_batch(batch, (many,), [(1, 8)])
        assert sub_batch.shape == (20, tokens)
        inputs = arrays_for(sub_batch)
        LAYOUT.write(batch, sub_batch, inputs, pad_token_id=99)
        ends = inputs["query_lengths"].tolist()
        real = 5 * count
        assert ends == [*range(0, real + 1, 5), *range(real + 1, real + 20 - count), tokens]


def test_what_does_not_fit_at_once_is_cut_between_texts():
    sub_batches = cut([300, 200, 20, 10, 500])
    assert [
        (sub_batch.rows.start, sub_batch.rows.stop, sub_batch.profile, sub_batch.shape) for sub_batch in sub_batches
    ] == [
        (0, 2, 1, (3, 512)),
        (2, 4, 0, (3, 32)),
        (4, 5, 1, (2, 512)),
    ]
    assert [sub_batch.rows.stop for sub_batch in cut([1] * 20)] == [8, 16, 20]


def test_a_text_outside_every_profile_names_them():
    with pytest.raises(InputError, match=r"513 tokens.*texts x tokens.*1x1:2x32:3x64, 1x1:4x256:8x512\. .*--profile"):
        cut([4, 513])


def test_tokens_places_and_lengths():
    batch = batch_of([3, 1, 5], [(2, 4), (0, 1), (2, 0)])
    (sub_batch,) = split_packed_batch(batch, (LARGE,), [(1, 8)])
    inputs = arrays_for(sub_batch)
    LAYOUT.write(batch, sub_batch, inputs, pad_token_id=99)
    assert inputs["input_ids"].tolist() == [1, 2, 3, 6, 11, 12, 13, 14, 15] + [99] * 7
    assert inputs["position_ids"].tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4] + [0] * 7
    assert inputs["query_lengths"].tolist() == inputs["kv_lengths"].tolist() == [0, 3, 4, 9, 16]
    assert inputs["mask_positions"].tolist() == [8, 1, 4, 0]


def test_types_are_packed_as_tokens_are():
    batch = batch_of([3, 1, 5])
    types = np.array([[0, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 0, 1, 1, 0]])  # at padding, too, where none is taken
    (sub_batch,) = split_packed_batch(batch, (LARGE,), [(1, 8)])
    inputs = {**arrays_for(sub_batch), "token_type_ids": np.full(16, -7)}
    LAYOUT.write(dataclasses.replace(batch, token_type_ids=types), sub_batch, inputs, pad_token_id=0)
    assert inputs["token_type_ids"].tolist() == [0, 1, 1, 1, 0, 0, 1, 1, 0] + [0] * 7
    LAYOUT.write(batch, sub_batch, inputs, pad_token_id=0)
    assert not inputs["token_type_ids"].any()


def test_positions_are_those_of_other_engines_whatever_the_mask_leaves_out():
    batch = batch_of([4, 4], [(1, 3), (0, 2)])
    batch.attention_mask[:] = [[1, 0, 1, 1], [0, 0, 1, 1]]
    (sub_batch,) = split_packed_batch(batch, (LARGE,), [(1, 8)])
    inputs = arrays_for(sub_batch)
    LAYOUT.write(batch, sub_batch, inputs, pad_token_id=0)
    assert inputs["position_ids"].tolist() == [0, 2, 3, 2, 3, 0, 0, 0]
    assert inputs["query_lengths"].tolist() == [0, 3, 5, 8]
    assert inputs["mask_positions"].tolist() == [4, 1]


@settings(max_examples=60)
@given(st.data())
def test_everything_comes_back_to_its_place(data):
    lengths = data.draw(st.lists(st.integers(1, 64), min_size=1, max_size=20))
    masks = [
        (row, data.draw(st.integers(0, lengths[row] - 1)))
        for row in data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=9))
    ]
    batch = batch_of(lengths, masks)
    results = LAYOUT.results(batch, ("last_hidden_state", "sentence_embedding", "logits"))
    for sub_batch in split_packed_batch(batch, (SMALL, LARGE), [(1, 2), (1, 4)]):
        texts, tokens = sub_batch.shape
        profile = (SMALL, LARGE)[sub_batch.profile]
        assert profile.takes(texts, tokens) and 1 <= sub_batch.num_masks <= (2, 4)[sub_batch.profile]
        inputs = arrays_for(sub_batch)
        LAYOUT.write(batch, sub_batch, inputs, pad_token_id=0)
        ends = inputs["query_lengths"]
        assert ends[0] == 0 and ends[-1] == tokens and (np.diff(ends) > 0).all(), "no text without a token"
        ids = inputs["input_ids"]
        sums = np.add.reduceat(ids, ends[:-1])
        for name, values in (
            ("last_hidden_state", np.stack([ids, inputs["position_ids"]], axis=1)),
            ("sentence_embedding", np.repeat(sums[:, None], 3, axis=1)),
            ("logits", np.repeat(ids[inputs["mask_positions"]][:, None], 5, axis=1)),
        ):
            assert values.shape == LAYOUT.shapes(sub_batch.shape, sub_batch.num_masks)[name]
            LAYOUT.place(name, values, sub_batch, results[name])
    real = batch.attention_mask == 1
    hidden = results["last_hidden_state"]
    np.testing.assert_array_equal(hidden[..., 0], batch.input_ids)
    np.testing.assert_array_equal(hidden[..., 1], np.where(real, np.arange(real.shape[1]), 0))
    np.testing.assert_array_equal(results["sentence_embedding"][:, 0], batch.input_ids.sum(axis=1))
    rows, tokens = np.array(masks, np.int64).reshape(-1, 2).T
    np.testing.assert_array_equal(results["logits"][:, 4], batch.input_ids[rows, tokens])
