"""Find the lines of a text file that do not read like language: broken, shuffled or repeated words.

    python examples/clean_data.py FILE                 # the built-in model
    python examples/clean_data.py FILE my-bundle

Every third word of a line is hidden in turn, and the model is asked for it. The score of a line is the share of the
hidden words that are among the model's fifty best guesses. Prose scores well above noise; where to cut depends on the
model and on your texts, so look at the lines near the cut before you drop any.
"""

import sys
from pathlib import Path

import gte_deploy

EVERY = 3
GUESSES = 50


def main() -> None:
    """Print every line with its score, the worst first."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    lines = [line for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines() if len(line.split()) >= EVERY]
    if not lines:
        sys.exit(f"{sys.argv[1]} has no line with {EVERY} words or more")
    hidden = []  # (number of the line, the hidden word, the line with [MASK] in its place)
    for number, line in enumerate(lines):
        words = line.split()
        for place in range(EVERY - 1, len(words), EVERY):
            masked = " ".join([*words[:place], "[MASK]", *words[place + 1 :]])
            hidden.append((number, words[place].strip(".,;:!?\"'()").lower(), masked))
    with gte_deploy.load(sys.argv[2] if len(sys.argv) > 2 else None) as model:
        answers = model.fill_mask([text for *_, text in hidden], top_k=GUESSES)
    if len(hidden) == 1:  # as in transformers' pipeline, a list with one text gets the answer of a single text
        answers = [answers]
    guessed: list[list[bool]] = [[] for _ in lines]
    for (number, word, _), candidates in zip(hidden, answers, strict=True):
        guessed[number].append(word in [candidate["token_str"] for candidate in candidates])
    scores = [sum(found) / len(found) for found in guessed]
    for number in sorted(range(len(lines)), key=scores.__getitem__):
        print(f"{scores[number]:.2f}  {lines[number][:100]}")


if __name__ == "__main__":
    main()
