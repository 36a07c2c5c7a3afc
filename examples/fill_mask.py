"""Fill the masked words of a few sentences.

    python examples/fill_mask.py                       # the built-in model
    python examples/fill_mask.py my-bundle             # a bundle that gte-export wrote, without torch

Shows the forms of the answers: a text with one mask gives a list of candidates, a text with several masks gives one
list for each, and `targets` chooses among words of your own.
"""

import sys

import gte_deploy


def main() -> None:
    """Ask for one mask, for several, and for the better of two words."""
    path = sys.argv[1] if len(sys.argv) > 1 else None
    with gte_deploy.load(path) as model:
        text = "The president of the united [MASK] of America."
        for answer in model.fill_mask(text, top_k=3):
            print(f"{answer['score']:.3f}  {answer['sequence']}")

        first, second = model.fill_mask("The [MASK] of the united [MASK] of America.", top_k=3)
        print("first mask: ", ", ".join(answer["token_str"] for answer in first))
        print("second mask:", ", ".join(answer["token_str"] for answer in second))

        (best, other) = model.fill_mask(
            "There is no doubt [MASK] the people want peace.", top_k=2, targets=["that", "the"]
        )
        print(f"{best['token_str']!r} is more likely than {other['token_str']!r}")


if __name__ == "__main__":
    main()
