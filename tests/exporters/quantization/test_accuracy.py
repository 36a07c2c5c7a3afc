import numpy as np
import pytest

from gte_deploy.errors import InputError
from gte_deploy.exporters.accuracy import measure_accuracy, reference_outputs
from gte_deploy.exporters.text_batches import builtin_texts, read_texts, text_batches
from gte_deploy.models import resolve_checkpoint
from gte_deploy.spec import ModelSpec
from gte_deploy.tokenization import load_tokenizer

SPEC = ModelSpec(task="fill-mask", max_length=512, vocab_size=30528, hidden_size=8, pad_token_id=0)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve_checkpoint(None))


@pytest.fixture(scope="module")
def batches(tokenizer):
    return text_batches(builtin_texts("evaluation"), tokenizer, SPEC, max_tokens=4000)


class Answers:
    """Hidden states and logits that know the right word; `turn` of the tokens get another direction."""

    def __init__(self, right, turn=0.0):
        self.right, self.turn = right, turn

    def run(self, batch, outputs):
        rng = np.random.default_rng(int(batch.input_ids.sum()))
        hidden = rng.standard_normal((*batch.input_ids.shape, 8)).astype(np.float32)
        hidden[batch.attention_mask == 0] = np.nan  # nobody may look there
        logits = np.zeros((len(batch.mask_positions), 30528), np.float32)
        best = np.arange(len(logits)) % 2 if self.right == "half" else np.zeros(len(logits))
        logits[np.arange(len(logits)), 5] = best
        logits[:, 7] = 0.5
        return {
            "last_hidden_state": hidden * (1 - 2 * (rng.random(hidden.shape[:2]) < self.turn))[..., None],
            "logits": logits,
        }


def test_the_same_answers_are_perfect(batches):
    reference = reference_outputs(Answers("half"), batches, SPEC)
    found = measure_accuracy(Answers("half"), reference, batches, SPEC)
    assert found.token_cosine_min == pytest.approx(1) and found.sentence_cosine_min == pytest.approx(1)
    assert found.top1_agreement == found.top5_agreement == 1
    assert found.tokens == sum(int(batch.attention_mask.sum()) for batch, _ in batches)
    assert found.masks == sum(len(wanted) for _, wanted in batches)


def test_differences_show(batches):
    reference = reference_outputs(Answers("half"), batches, SPEC)
    found = measure_accuracy(Answers("none", turn=0.25), reference, batches, SPEC)
    assert found.token_cosine_mean == pytest.approx(0.5, abs=0.05) and found.token_cosine_min == pytest.approx(-1)
    assert found.top1_agreement == pytest.approx(0.5, abs=0.1)
    assert found.top1 == (0, 0)


def test_texts_come_alone_together_and_in_windows(batches, tokenizer):
    lengths = [int(batch.attention_mask.sum(axis=1).max()) for batch, _ in batches]
    assert {32, 128, 512} <= set(lengths) and 2048 not in lengths
    assert any(len(batch.input_ids) == 4 and (batch.attention_mask == 0).any() for batch, _ in batches)
    share = sum(len(wanted) for _, wanted in batches) / sum(int(batch.attention_mask.sum()) for batch, _ in batches)
    assert 0.12 < share < 0.18
    for batch, wanted in batches:
        assert (batch.input_ids[tuple(batch.mask_positions.T)] == tokenizer.mask_token_id).all()
        assert not np.isin(wanted, (0, 101, 102, 103)).any()


def test_the_same_every_time(batches, tokenizer):
    again = text_batches(builtin_texts("evaluation"), tokenizer, SPEC, max_tokens=4000)
    for (first, _), (second, _) in zip(batches, again, strict=True):
        np.testing.assert_array_equal(first.input_ids, second.input_ids)


def test_calibration_and_evaluation_share_no_text():
    assert not set(filter(None, builtin_texts("calibration"))) & set(builtin_texts("evaluation"))


def test_a_short_text_is_enough(tokenizer):
    (batch, wanted), *rest = text_batches(["Hello"], tokenizer, SPEC, max_tokens=1000)
    assert not rest and batch.input_ids.shape == (1, 3) and len(wanted) == 1


@pytest.mark.parametrize(("content", "reason"), [(b"\n \n", "holds no text"), (b"\xff\xfe\xff", "cannot be read")])
def test_a_users_file_without_text_is_refused(tmp_path, content, reason):
    file = tmp_path / "texts.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=reason):
        read_texts(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_texts(tmp_path / "missing.txt")
