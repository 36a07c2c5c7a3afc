import numpy as np
import pytest

from gte_deploy.core.errors import InputError
from gte_deploy.training.data.corpus import Vocabulary
from gte_deploy.training.data.masking import Masking, mask_places, mask_tokens

VOCAB = Vocabulary(size=1_000, cls_id=2, sep_id=3, mask_id=4, pad_id=0, unk_id=1, special_ids=(0, 1, 2, 3, 4, 500))
TOKENS = 1_000_000
LENGTH = 500  # of a chunk


def mask_all(token_ids, **options):
    """Mask a flat corpus as chunks of LENGTH tokens."""
    places, chunks = np.arange(len(token_ids)) % LENGTH, np.arange(len(token_ids)) // LENGTH
    arguments = {"vocab": VOCAB, "masking": Masking(), "seed": 1, "epochs": 0} | options
    return mask_places(token_ids, places, chunks=chunks, **arguments)


@pytest.fixture(scope="module")
def ordinary():
    return np.random.default_rng(0).choice(VOCAB.ordinary_ids, TOKENS)


@pytest.fixture(scope="module")
def masked(ordinary):
    return mask_all(ordinary)


def test_rate_and_split_on_a_million_tokens(ordinary, masked):
    input_ids, positions, labels = masked
    assert abs(len(positions) / TOKENS - 0.30) <= 0.002
    changed = input_ids[positions]
    is_mask, stays = changed == VOCAB.mask_id, changed == labels
    assert abs(is_mask.mean() - 0.8) <= 0.005
    # one random draw in 994 hits the token itself
    assert abs((~is_mask & ~stays).mean() - 0.1) <= 0.005
    assert abs(stays.mean() - 0.1) <= 0.005


def test_labels_are_the_tokens_before(ordinary, masked):
    input_ids, positions, labels = masked
    np.testing.assert_array_equal(labels, ordinary[positions])
    others = np.ones(TOKENS, bool)
    others[positions] = False
    np.testing.assert_array_equal(input_ids[others], ordinary[others])
    assert np.all(np.diff(positions) > 0)
    assert {array.dtype for array in masked} == {np.dtype(np.int64)}


def test_random_ids_span_the_vocabulary_evenly_and_nothing_else(masked):
    input_ids, positions, labels = masked
    drawn = input_ids[positions]
    drawn = drawn[(drawn != VOCAB.mask_id) & (drawn != labels)]
    counts = np.bincount(drawn, minlength=VOCAB.size)
    assert np.flatnonzero(counts).tolist() == VOCAB.ordinary_ids.tolist()
    expected = len(drawn) / len(VOCAB.ordinary_ids)
    chi_square = ((counts[VOCAB.ordinary_ids] - expected) ** 2 / expected).sum()
    freedom = len(VOCAB.ordinary_ids) - 1
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_special_tokens_are_never_masked():
    token_ids = np.tile(VOCAB.special_ids, 1_000)
    input_ids, positions, labels = mask_all(token_ids, masking=Masking(probability=1.0))
    assert len(positions) == len(labels) == 0
    np.testing.assert_array_equal(input_ids, token_ids)


def test_probability_one_masks_every_ordinary_token(ordinary):
    chunk = np.concatenate([[2], ordinary[:50], [3]])
    arguments = {"vocab": VOCAB, "seed": 0, "epoch": 0, "chunk": 0}
    input_ids, positions, _ = mask_tokens(chunk, masking=Masking(1.0, 1.0, 0.0), **arguments)
    assert positions.tolist() == list(range(1, 51))
    assert input_ids.tolist() == [2, *[4] * 50, 3]
    kept, positions, _ = mask_tokens(chunk, masking=Masking(1.0, 0.0, 0.0), **arguments)
    assert len(positions) == 50 and np.array_equal(kept, chunk)


def test_every_place_in_a_chunk_is_masked_alike(masked):
    counts = np.bincount(masked[1] % LENGTH, minlength=LENGTH) / (TOKENS / LENGTH)
    assert np.abs(counts - 0.3).max() < 5 * np.sqrt(0.3 * 0.7 / (TOKENS / LENGTH))


@pytest.mark.parametrize("change", ["seed", "epoch", "chunk"])
def test_another_seed_epoch_or_chunk_gives_independent_masks(ordinary, change):
    base = {"seed": 3, "epoch": 1, "chunk": 7}
    first, second = (
        mask_tokens(ordinary[:100_000], vocab=VOCAB, masking=Masking(), **arguments)[1]
        for arguments in (base, base | {change: base[change] + 1})
    )
    both = len(np.intersect1d(first, second)) / 100_000
    assert abs(both - 0.09) < 0.005


def test_masks_do_not_depend_on_the_neighbours(ordinary):
    """A chunk among others equals the chunk alone, and its argument is left as it was."""
    before = ordinary.copy()
    input_ids, positions, labels = mask_all(ordinary[: 10 * LENGTH])
    for chunk in (0, 4, 9):
        part = slice(chunk * LENGTH, (chunk + 1) * LENGTH)
        alone = mask_tokens(ordinary[part], vocab=VOCAB, masking=Masking(), seed=1, epoch=0, chunk=chunk)
        here = (positions >= part.start) & (positions < part.stop)
        np.testing.assert_array_equal(alone[0], input_ids[part])
        np.testing.assert_array_equal(alone[1], positions[here] - part.start)
        np.testing.assert_array_equal(alone[2], labels[here])
    np.testing.assert_array_equal(ordinary, before)


def test_masks_stay_as_they_were_when_runs_began():
    """Known answers, from this code: a change of them would change the data of every run that resumes."""
    input_ids, positions, labels = mask_tokens(
        np.arange(5, 45), vocab=VOCAB, masking=Masking(), seed=1, epoch=2, chunk=2**33
    )
    assert positions.tolist() == [0, 2, 3, 11, 12, 13, 18, 20, 21, 22, 38]
    assert input_ids[positions].tolist() == [4, 4, 4, 4, 4, 4, 4, 4, 4, 27, 4]
    assert labels.tolist() == [5, 7, 8, 16, 17, 18, 23, 25, 26, 27, 43]


def test_a_short_chunk_may_get_no_mask():
    counts = [
        len(mask_tokens(np.array([2, 9, 3]), vocab=VOCAB, masking=Masking(), seed=0, epoch=0, chunk=chunk)[1])
        for chunk in range(2_000)
    ]
    assert set(counts) == {0, 1}
    assert abs(np.mean(counts) - 0.3) < 0.05


@pytest.mark.parametrize("token", [-1, 1_000])
def test_an_id_outside_the_vocabulary_is_refused(token):
    with pytest.raises(InputError, match="not all in the vocabulary of 1000"):
        mask_tokens(np.array([5, token]), vocab=VOCAB, masking=Masking(), seed=0, epoch=0, chunk=0)


@pytest.mark.parametrize("arguments", [(0.0,), (1.1,), (0.3, -0.1), (0.3, 0.8, 0.3), (0.3, 0.8, -0.1)])
def test_impossible_masking_is_refused(arguments):
    with pytest.raises(InputError):
        Masking(*arguments)
