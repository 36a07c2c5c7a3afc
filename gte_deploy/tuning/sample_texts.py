"""The texts that `gte-deploy compare` asks two bundles about if the user gives none."""

QUESTION = "How does the heart pump blood through the body?"
"""The query for rerankers; the texts are the documents."""

TEXTS = (
    "The heart has four chambers and beats about seventy times a minute.",
    "Blood carries oxygen from the lungs to every part of the body.",
    "Valves keep the blood from flowing back into the heart.",
    "Regular exercise makes the muscle of the heart stronger.",
    "The river rose after three days of rain and flooded the lower fields.",
    "Paris is the capital of France and lies on the Seine.",
    "The treaty was signed in the spring and ended a war of nine years.",
    "She planted tomatoes, beans and basil behind the house.",
    "Bread needs flour, water, salt, yeast and a hot oven.",
    "A recipe for a simple soup: onions, carrots, potatoes and an hour of patience.",
    "The program crashed because a pointer was used after its memory had been freed.",
    "To install the package, create a virtual environment and run the installer in it.",
    "A database index makes reading faster and writing a little slower.",
    "The court found that the contract was void because it had not been signed.",
    "Shares of the company fell by four percent after the report.",
    "The central bank left its interest rate unchanged this month.",
    "Light travels about three hundred thousand kilometres in a second.",
    "A telescope in orbit sees stars without the blur of the atmosphere.",
    "Bees tell each other where flowers are by dancing in the hive.",
    "The old bridge was closed, so the bus took the road along the coast.",
    "He missed the last train and walked home in the snow.",
    "The orchestra played the second symphony, and the audience stood up to applaud.",
    "The goalkeeper saved two penalties, and the match ended without a goal.",
    "Please return the signed form by Friday, and call us if you have any questions.",
)
